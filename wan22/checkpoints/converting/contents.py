"""What a file or folder holds: models, told from their tensors, and what a repository has beside them."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files.weights import WeightFile, read_weights
from ..loading.fill import Model, empty_weights, fill
from ..loading.models import AutoencoderKLWan, WanTransformer3DModel, official_settings, read_json
from ..loading.text_encoder import (
    COPY,
    EMBEDDING,
    UNUSED,
    embedding_of,
    named_by_transformers,
    text_encoder_config,
)
from ..naming.configs import HEAD_DIM
from ..naming.dialects import Tensors, normalize, without_prefix
from ..naming.keys import TEXT_ENCODER, TEXT_ENCODER_GGUF, TRANSFORMER, KeyTable
from ..naming.names import listed, official_names, shapes_of

EXPERTS = ("high_noise_model", "low_noise_model")  # their folders in the official layout
TOKENIZERS = ("google/umt5-xxl", "tokenizer")  # its folder in the official layout, and in Diffusers'
MODELS = {"transformer": "transformer", "transformer_2": "transformer"}  # components and their kinds
MODELS |= {kind: kind for kind in ("vae", "text_encoder")}
_CLASSES: dict[str, Any] = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # of weights, whatever they are


@dataclass(frozen=True)
class Content:
    """One model's weights and settings.

    Args:
        kind: "transformer", "vae" or "text_encoder".
        source: the file or folder.
        tensors: under official names, memory-mapped.
        origins: the name in the source of each.
        table: from official names to those of the Diffusers layout.
        settings: config.json of the Diffusers layout.
        bare: what of it the tensors alone tell; empty for a text encoder.
    """

    kind: str
    source: str
    tensors: Tensors
    origins: Mapping[str, str]
    table: KeyTable
    settings: Mapping[str, Any]
    bare: Mapping[str, Any] = field(default_factory=dict)


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
    models: Mapping[str, Content]
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


def read_content(path: Path, config: Mapping[str, Any], head_dim: int | None = None) -> Content:
    """Read one model and account for each of its tensors, as the loader does.

    Args:
        path: a file, or a folder of shards.
        config: config.json beside it; of no concern if it is another model's.
        head_dim: as in `read_source`.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: it cannot be read, is no model of Wan, or holds weights that have no place.
    """
    file = read_weights(path)
    kind = _kind(file)
    if kind == "text_encoder":
        return _text_encoder(file, config)
    cls = _CLASSES[kind]
    table = cls._keys(file.source, _stripped(file))
    ignored = cls._keys_to_ignore_on_load_unexpected or ()
    tensors, origins = _traced(file, lambda names: official_names(file.source, names, table, ignored))
    known: dict[str, Any] = {"attention_head_dim": head_dim} if head_dim else {}
    if config.get("_class_name") == "WanModel":
        known = official_settings(dict(config))
    elif config.get("_class_name") == cls.__name__ and "attention_head_dim" in config:
        known = {"attention_head_dim": config["attention_head_dim"]}
    bare = cls._config(file.source, shapes_of(tensors), known)
    with empty_weights():
        plain = model = cls(**bare)
        if config.get("_class_name") == cls.__name__:
            model = cls.from_config(dict(config))
        elif kind == "transformer":
            model = cls(**bare | known)
    _audit(model, file.source, {str(table.rename(name)): tensor for name, tensor in tensors.items()})
    settings = [json.loads(which.to_json_string()) for which in (model, plain)]
    return Content(kind, file.source, tensors, origins, table, *settings)


def _kind(file: WeightFile) -> str:
    names = [*_stripped(file)]
    tables = {
        "transformer": (TRANSFORMER,),
        "vae": (AutoencoderKLWan._keys(file.source, names),),
        "text_encoder": (TEXT_ENCODER, TEXT_ENCODER_GGUF),
    }
    known = {
        kind: max(max(table.count(names), table.inverse.count(names)) for table in both)
        for kind, both in tables.items()
    }
    kind = max(known, key=lambda kind: known[kind])
    if not known[kind]:
        raise ValueError(
            f"{file.source} is neither a transformer, nor a VAE, nor a text encoder of Wan; "
            f"it holds {listed(names) if names else 'nothing'}"
        )
    return kind


def _text_encoder(file: WeightFile, config: Mapping[str, Any]) -> Content:
    from transformers import UMT5Config, UMT5EncoderModel

    kept = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(UNUSED)}
    file = WeightFile(file.source, kept, file.metadata)
    tensors, origins = _traced(file, lambda names: named_by_transformers(file.source, names))
    embedding_of(file.source, tensors)  # refuses two that differ
    if COPY in tensors:
        tensors.setdefault(EMBEDDING, tensors[COPY])
        origins.setdefault(EMBEDDING, origins[COPY])
        del tensors[COPY]
    if config.get("model_type") == "umt5":
        settings = UMT5Config.from_dict(dict(config))
    else:
        settings = UMT5Config(**text_encoder_config(file.source, shapes_of(tensors)))
    settings.architectures = ["UMT5EncoderModel"]
    with empty_weights():
        model = UMT5EncoderModel(settings)
    _audit(model, file.source, tensors | {COPY: tensors[EMBEDDING]})
    official = {name: str(TEXT_ENCODER.inverse.rename(name)) for name in tensors}
    return Content(
        "text_encoder",
        file.source,
        {official[name]: tensor for name, tensor in tensors.items()},
        {official[name]: origins[name] for name in tensors},
        TEXT_ENCODER,
        json.loads(settings.to_json_string()),
    )


def _stripped(file: WeightFile) -> Tensors:
    """Return a file's tensors without prefixes, in their order."""
    return without_prefix({name.replace("_orig_mod.", ""): t for name, t in file.tensors.items()})


def _traced(file: WeightFile, rename: Callable[[Any], Any]) -> tuple[Tensors, dict[str, str]]:
    """Rename a file's tensors by one of the loader's functions; return them and their names in the file."""
    tensors = normalize(file)
    origins = dict(zip(_stripped(file), file.tensors, strict=True))
    names = rename({name: name for name in tensors})
    found = {new: tensors[old] for new, old in names.items()}
    return found, {new: origins[old] for new, old in names.items()}


def _audit(model: Model, source: str, tensors: Tensors) -> None:
    """Refuse by name what is missing, left over or of another shape: the loader's own check, on no data."""
    fill(model, source, {n: torch.empty(t.shape, device="meta") for n, t in tensors.items()})


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


def _experts(path: Path, found: dict[Path, Content]) -> dict[str, Content]:
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


def lost_settings(content: Content, to: str) -> list[str]:
    """Return the settings that a file without config.json, or an official one's, does not keep."""
    bare = dict(content.bare)
    if content.kind == "transformer" and to == "official":
        bare["eps"] = content.settings["eps"]
    elif content.kind == "transformer":
        bare["attention_head_dim"] = HEAD_DIM
        bare["num_attention_heads"] = content.settings["num_attention_heads"]
    return sorted(n for n, value in bare.items() if not n.startswith("_") and content.settings[n] != value)
