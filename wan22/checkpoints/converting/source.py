"""What is to be converted: the models in a file or folder, and what a repository has beside them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checks import listed, shown
from ..files.hub import EXPERTS, TOKENIZERS
from ..files.weights import SUFFIXES, read_json, shards_of
from ..loading.recognize import kinds_in, read_model
from ..loading.stored import StoredModel
from ..naming.schemas import read_config

# Components of a pipeline, and their kinds.
MODELS = {
    "transformer": "transformer",
    "transformer_2": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
}


@dataclass(frozen=True)
class Source:
    """What is to be converted."""

    path: Path  # file or folder
    models: Mapping[str, StoredModel]  # by component of a pipeline
    whole: bool = False  # a repository, not one model
    tokenizer: Path | None = None  # its folder
    index: Mapping[str, Any] | None = None  # model_index.json of the Diffusers layout
    folders: Mapping[str, Path] = field(default_factory=dict)  # its further components, as the scheduler


def read_source(path: Path, head_dim: int | None = None) -> Source:
    """Read a weight file, a model's folder, or a repository in any layout; weights stay memory-mapped.

    What is missing is named by a FileNotFoundError, what cannot be read or has no place by a ValueError.
    `head_dim` is the size of a transformer's head where no config.json has it; None: 128, as in all releases.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {path}, and a repository's name is like org/name"
        )
    if path.is_file():
        kinds: list[str | None] = [*kinds_in(path)]
        models = [_read(path, {}, head_dim, kind) for kind in kinds or [None]]
        return Source(path, {model.kind: model for model in models}, whole=len(models) > 1)
    if (path / "model_index.json").is_file():
        return _diffusers_repository(path, head_dim)
    return _folder(path, head_dim)


def _read(path: Path, config: dict[str, Any], head_dim: int | None, kind: str | None = None) -> StoredModel:
    """Read one model, and check and account for each of its tensors as the loader does."""
    model = read_model(path, kind, config, head_dim)
    model.check()
    model.meta_model()
    return model


def _diffusers_repository(path: Path, head_dim: int | None) -> Source:
    index = read_json(path / "model_index.json")
    models, folders = {}, {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not entry[0]:
            continue
        if not name.isidentifier():  # it could lead out of the folder
            rule = "the name of a component must be an identifier, such as transformer_2"
            raise ValueError(f"{path / 'model_index.json'} lists {shown(name)}; {rule}")
        folder = path / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} has no {name}, which its model_index.json lists")
        if name not in MODELS:
            folders[name] = _without_strangers(folder, path)
            continue
        models[name] = _read(folder, read_config(folder / "config.json"), head_dim)
        if models[name].kind != MODELS[name]:
            raise ValueError(f"{folder} holds a {models[name].kind}, not a {MODELS[name]}")
    if not models:
        raise ValueError(f"{path / 'model_index.json'} names no models, such as transformer")
    return Source(path, models, True, folders.pop("tokenizer", None), index, folders)


def _without_strangers(folder: Path, source: Path) -> Path:
    """Return a folder that is copied as it is; refuse links in it that lead out of the source.

    With them a stranger's archive could have a private file copied into the result. In the hub's cache, files
    are links to blobs.
    """
    root = source.resolve()
    roots = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    inside = (Path(place, name) for place, *names in os.walk(folder) for name in (*names[0], *names[1]))
    for path in (folder, *inside):
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(place) for place in roots):
            raise ValueError(f"{path} is a link to {target}, outside of {source}; put the file itself there")
    return folder


def _folder(path: Path, head_dim: int | None) -> Source:
    """Read a folder in the official layout, one model's folder, or a folder of single files."""
    found = {place: _read(place, config, head_dim) for place, config in _weights_in(path)}
    if not found:
        raise FileNotFoundError(
            f"{path} holds no weights: neither model_index.json, nor {' and '.join(EXPERTS)}, nor files "
            f"that end in {', '.join(SUFFIXES)}"
        )
    tokenizer = next((path / name for name in TOKENIZERS if (path / name).is_dir()), None)
    if tokenizer is not None:
        _without_strangers(tokenizer, path)
    if len(found) == 1 and tokenizer is None:
        (model,) = found.values()
        return Source(path, {model.kind: model})
    models = _experts(path, {place: model for place, model in found.items() if model.kind == "transformer"})
    for place, model in found.items():
        if model.kind in models and model.kind != "transformer":
            raise ValueError(f"{path} holds two of {model.kind}: {models[model.kind].source} and {place}")
        models.setdefault(model.kind, model)
    return Source(path, models, True, tokenizer)


def _weights_in(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the weight files, and folders of shards, in a folder and the folders in it, with config.json."""
    found = []
    for place in (path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))):
        config = read_config(place / "config.json")
        indices = place.glob("*.safetensors.index.json")
        shards = {name for index in indices for name in shards_of(index).values()}
        found += [(place, config)] if shards else []
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
        found += [(file, config) for file in files if file.name not in shards]
    return found


def _experts(path: Path, found: dict[Path, StoredModel]) -> dict[str, StoredModel]:
    """Return the transformers by component; no tensor says which is which, only their files' names do."""
    names = {place: str(place.relative_to(path)).lower() for place in found}
    if len(found) == 1:
        ((place, model),) = found.items()
        for expert, other in (EXPERTS, EXPERTS[::-1]):
            if names[place].startswith(expert):
                raise FileNotFoundError(f"{path} has {expert}, but no {other}")
        return {"transformer": model}
    high = [place for place, name in names.items() if "high" in name]
    low = [place for place, name in names.items() if re.search("(?<!f)low", name)]
    if found and (len(found) > 2 or len(high) != 1 or len(low) != 1 or high == low):
        raise ValueError(
            f"{path} has {len(found)} transformers, {listed(names.values())}; it must have one, or two: "
            "one with 'high' in its name (for high noise) and one with 'low'"
        )
    return {"transformer": found[high[0]], "transformer_2": found[low[0]]} if found else {}
