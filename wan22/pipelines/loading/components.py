"""Refuse a folder in the Diffusers layout that is not whole, before anything in it is loaded."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.files.folders import DIFFUSERS, TRANSFORMERS, Names, names_of, weights_in
from ...checkpoints.files.weights import read_json
from ...checkpoints.loading.recognize import read_model
from ...checkpoints.naming.schemas import SCHEDULER, read_config
from .checkpoint import Wanted
from .index import is_component, refuse_mark
from .single_files import VOCABULARIES

# What must be in a component's folder: one of these files, and weights with these names.
_SETTINGS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": VOCABULARIES,
    "image_processor": ("preprocessor_config.json",),
}
OURS = ("transformer", "transformer_2", "vae")  # loaded by our own classes
WEIGHTS: dict[str, Names] = {
    **dict.fromkeys(OURS, DIFFUSERS),
    **dict.fromkeys(("text_encoder", "image_encoder"), TRANSFORMERS),
}
_OUR_ENCODERS = ("UMT5EncoderModel", "CLIPVisionModel")
_ENCODERS = (*_OUR_ENCODERS, "CLIPVisionModelWithProjection")


def check_components(folder: Path, index: Mapping[str, Any], wanted: Wanted) -> None:
    """Refuse a folder that lacks what its model_index.json lists; what is given need not be there.

    A FileNotFoundError names the file or folder, a ValueError one that is not JSON.
    """
    for name in _SETTINGS.keys() | WEIGHTS.keys():
        if name in wanted.given or not is_component(index.get(name)):
            continue
        place = folder / name
        if not place.is_dir():
            raise FileNotFoundError(f"{folder} has no folder {name}, which its model_index.json lists")
        _check_settings(place, _SETTINGS.get(name, ("config.json",)), name in OURS)
        if name in WEIGHTS:
            names = names_of(WEIGHTS[name], wanted.others.get("use_safetensors"))
            weights = find_weights(place, wanted.others.get("variant"), names)
            if index[name][1] in _ENCODERS:
                _account(weights, name)


def load_encoders(
    folder: Path,
    index: Mapping[str, Any],
    wanted: Wanted,
    dtypes: Mapping[str, torch.dtype | None],
    loaded_already: Container[str] = (),
) -> dict[str, Any]:
    """Load the encoders of a checked folder, mapped from their files, as transformers' own loader does not.

    `dtypes` are those of the components and "default". Where something is asked for that only the other
    loader does, such as a `device_map`, the encoders are left to it.
    """
    if wanted.others.keys() - {"variant", "use_safetensors"}:
        return {}
    loaded = {}
    for name in ("text_encoder", "image_encoder"):
        place = folder / name
        known = is_component(index.get(name)) and index[name][1] in _OUR_ENCODERS
        if not known or name in wanted.given or name in loaded_already:
            continue
        config = read_config(place / "config.json")
        if "quantization_config" not in config:
            names = names_of(TRANSFORMERS, wanted.others.get("use_safetensors"))
            weights = find_weights(place, wanted.others.get("variant"), names)
            model = read_model(weights, name, config).load(dtypes.get(name, dtypes["default"]))
            model.config.name_or_path = model.name_or_path = str(place)
            loaded[name] = model
    return loaded


def _check_settings(place: Path, names: tuple[str, ...], ours: bool) -> None:
    """Check that one of the files is there, and that what is JSON can be read."""
    found = [place / name for name in names if (place / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{place} has no {names[0]}")
    for path in found:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            read_config(path, SCHEDULER if place.name == "scheduler" else None)
        if not ours:
            refuse_mark(path)
    read_json(place / "tokenizer_config.json")


def _account(weights: Path, kind: str) -> None:
    """Refuse weights that lack some, or have others: transformers would draw the missing ones at random."""
    config = read_config(weights.with_name("config.json"))
    if "quantization_config" not in config:  # such weights have tensors beside the parameters
        read_model(weights, kind, config).meta_model()


def find_weights(place: Path, variant: str | None, names: Names) -> Path:
    """Return a component's weights, those without the variant if it has no other, as diffusers does."""
    if variant is not None:
        try:
            return weights_in(place, variant, names)
        except FileNotFoundError:
            if list(place.glob(f"*.{variant}.*")):
                raise
    return weights_in(place, None, names)
