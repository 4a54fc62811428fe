"""A checkpoint's pipeline without weights: what can be planned with before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ..accel.planning.meta_models import released_models, store_as
from ..checkpoints.files.hub import OPTIONS
from ..checkpoints.files.safetensors import stored_dtype
from ..checkpoints.loading.fill import empty_weights
from ..checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ..schedulers import FlowMatchUniPCScheduler
from .files import find_official, official_preset

_CLASSES = {
    "transformer": WanTransformer3DModel,
    "transformer_2": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
}
_ENCODERS = ("text_encoder", "image_encoder")


def outline(pipeline: Any, source: Any, options: dict[str, Any]) -> Any:
    """Return a pipeline whose models are on the meta device.

    Args:
        pipeline: the class.
        source: folder or repository; of a repository, only configurations are downloaded.
        options: of `from_pretrained`; models that are given are taken as they are.

    Returns: the pipeline; None if the checkpoint does not say enough.
    """
    hub = {name: options[name] for name in OPTIONS & options.keys()}
    official = find_official(str(source), hub)
    if official is not None:
        preset = official_preset(official)
        found = {} if preset is None else released_models(preset)
    else:
        found = _models_of(_configs(str(source), hub), options)
    given = {name: options[name] for name in (*_CLASSES, *_ENCODERS) if name in options}
    models = found | given
    if "image_encoder" not in pipeline._optional_components:  # a checkpoint for images, and text alone
        models.pop("image_encoder", None)
    if models.get("vae") is None or models.get("transformer") is None:
        return None
    two = models.get("transformer_2") is not None
    parts = {
        "tokenizer": None,
        "scheduler": FlowMatchUniPCScheduler(),
        "boundary_ratio": 0.9 if two else None,
    }
    return pipeline(**parts | {"text_encoder": None} | models)


def _configs(source: str, hub: dict[str, Any]) -> Path:
    """Return a folder with the configurations of a checkpoint in the Diffusers layout."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    return Path(snapshot_download(source, allow_patterns=["model_index.json", "*/config.json"], **hub))


def _models_of(folder: Path, options: dict[str, Any]) -> dict[str, nn.Module]:
    """Return the models that a folder in the Diffusers layout has configurations of, on the meta device."""
    dtypes = options.get("dtype") or options.get("torch_dtype")
    models: dict[str, nn.Module] = {}
    for name in (*_CLASSES, *_ENCODERS):
        path = folder / name / "config.json"
        if not path.is_file():
            continue
        dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
        stored = stored_dtype(path.parent, options.get("variant"))
        models[name] = _model_of(name, json.loads(path.read_text()))
        store_as(models[name], dtype or stored or torch.bfloat16, stored)
    return models


def _model_of(name: str, config: dict[str, Any]) -> Any:
    with empty_weights():
        if name in _CLASSES:
            return _CLASSES[name].from_config(config)
        from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

        if name == "image_encoder":
            return CLIPVisionModel(CLIPVisionConfig.from_dict(config))
        return UMT5EncoderModel(UMT5Config.from_dict(config))
