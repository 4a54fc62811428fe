"""What a file or folder holds: models, told from their tensors, and what a repository has beside them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.weights import read_json
from ..loading.recognize import read_model
from ..loading.stored import StoredModel
from ..naming.configs import HEAD_DIM
from ..naming.names import listed, shapes_of

EXPERTS = ("high_noise_model", "low_noise_model")  # their folders in the official layout
TOKENIZERS = ("google/umt5-xxl", "tokenizer")  # its folder in the official layout, and in Diffusers'
MODELS = {"transformer": "transformer", "transformer_2": "transformer"}  # components and their kinds
MODELS |= {kind: kind for kind in ("vae", "text_encoder")}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # of weights, whatever they are


@dataclass(frozen=True)
class Source:
    """What is to be converted.

    Args:
        path: the file or folder.
        models: by component of a pipeline.
        whole: whether it is a repository, and not one model.
        tokenizer: its folder.
        index: model_index.json of the Diffusers layout.
        folders: further components of the Diffusers layout, such as the scheduler.
    """

    path: Path
    models: Mapping[str, StoredModel]
    whole: bool = False
    tokenizer: Path | None = None
    index: Mapping[str, Any] | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)


def read_source(path: Path, head_dim: int | None = None) -> Source:
    """Read a weight file, a model's folder, or a repository in any layout; weights stay memory-mapped.

    Args:
        path: of it.
        head_dim: of a transformer for which no config.json tells it; None: that of every released one.

    Raises:
        FileNotFoundError: something is missing; it is named.
        ValueError: something cannot be read, is no model of Wan, or has no place.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {path}, and a repository's name is like org/name"
        )
    if path.is_file():
        content = read_content(path, {}, head_dim)
        return Source(path, {content.kind: content})
    if (path / "model_index.json").is_file():
        return _diffusers_repository(path, head_dim)
    return _folder(path, head_dim)


def read_content(path: Path, config: dict[str, Any], head_dim: int | None = None) -> StoredModel:
    """Read one model's file or folder, and account for each of its tensors as the loader does.

    Args:
        path: file, or folder of shards.
        config: config.json beside it; ignored if it is another model's.
        head_dim: as in `read_source`.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: it cannot be read, is no model of Wan, or holds weights that have no place.
    """
    stored = read_model(path, config=config, head_dim=head_dim)
    stored.format.checked(stored.source, stored.tensors)
    stored.meta_model()
    return stored


# ---- repositories ----


def _diffusers_repository(path: Path, head_dim: int | None) -> Source:
    index = read_json(path / "model_index.json")
    models, folders = {}, {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not entry[0]:
            continue
        folder = path / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} has no {name}, which its model_index.json lists")
        if name not in MODELS:
            folders[name] = folder
            continue
        models[name] = read_content(folder, read_json(folder / "config.json"), head_dim)
        if models[name].kind != MODELS[name]:
            raise ValueError(f"{folder} holds a {models[name].kind}, not a {MODELS[name]}")
    return Source(path, models, True, folders.pop("tokenizer", None), index, folders)


def _folder(path: Path, head_dim: int | None) -> Source:
    """Read a folder in the official layout, one model's folder, or a folder of single files."""
    found = [(place, read_content(place, config, head_dim)) for place, config in _weights_in(path)]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no weights: neither model_index.json, nor {' and '.join(EXPERTS)}, nor files "
            f"that end in {', '.join(SUFFIXES)}"
        )
    tokenizer = next((path / name for name in TOKENIZERS if (path / name).is_dir()), None)
    if len(found) == 1 and tokenizer is None:
        ((_, content),) = found
        return Source(path, {content.kind: content})
    models = _experts(path, {place: content for place, content in found if content.kind == "transformer"})
    for place, content in found:
        if content.kind in models and content.kind != "transformer":
            raise ValueError(f"{path} holds two of {content.kind}: {models[content.kind].source} and {place}")
        models.setdefault(content.kind, content)
    return Source(path, models, True, tokenizer)


def _weights_in(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the weight files, and folders of shards, in a folder and the folders in it, with config.json."""
    found = []
    for place in (path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))):
        config, shards = read_json(place / "config.json"), set()
        for index in place.glob("*.safetensors.index.json"):
            shards |= set(json.loads(index.read_text())["weight_map"].values())
        found += [(place, config)] if shards else []
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
        found += [(file, config) for file in files if file.name not in shards]
    return found


def _experts(path: Path, found: dict[Path, StoredModel]) -> dict[str, StoredModel]:
    """Tell which transformer is which; no tensor says so, only their names do."""
    names = {place: str(place.relative_to(path)).lower() for place in found}
    if len(found) == 1:
        for expert, other in (EXPERTS, EXPERTS[::-1]):
            if names[next(iter(found))].startswith(expert):
                raise FileNotFoundError(f"{path} has {expert}, but no {other}")
        return {"transformer": next(iter(found.values()))}
    high = [place for place, name in names.items() if "high" in name]
    low = [place for place, name in names.items() if re.search("(?<!f)low", name)]
    if found and (len(found) > 2 or len(high) != 1 or len(low) != 1 or high == low):
        raise ValueError(
            f"{path} has {len(found)} transformers, {listed(names.values())}; it must have one, or two: "
            "one with 'high' in its name (for high noise) and one with 'low'"
        )
    return {"transformer": found[high[0]], "transformer_2": found[low[0]]} if found else {}


def lost_settings(content: StoredModel, to: str) -> list[str]:
    """Return the settings that a file without config.json, or an official one's, does not keep."""
    if content.kind == "text_encoder":
        return []
    names = {"attention_head_dim"} & content.settings.keys()
    known = {name: content.settings[name] for name in names}
    config = content.format.config(content.source, shapes_of(content.tensors), {}, known)
    bare = content.format.settings(config)
    if content.kind == "transformer" and to == "official":
        bare["eps"] = content.settings["eps"]
    elif content.kind == "transformer":
        bare["attention_head_dim"] = HEAD_DIM
        bare["num_attention_heads"] = content.settings["num_attention_heads"]
    return sorted(n for n, value in bare.items() if not n.startswith("_") and content.settings[n] != value)
