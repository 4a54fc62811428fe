"""The JSON files beside the weights in each layout, and the settings that a layout does not keep."""

from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch

from ...presets import Preset, has_timestep_per_token
from ..files.weights import read_json
from ..loading.stored import StoredModel
from ..naming.configs import HEAD_DIM
from ..naming.names import shapes_of
from ..naming.schemas import SCHEDULER, read_config
from .source import Source

# What an official config.json leaves out unless it is another value. Source: Wan2.2 wan/modules/model.py.
_OFFICIAL_DEFAULTS = {"patch_size": [1, 2, 2], "text_dim": 4096, "cross_attn_norm": True}


def diffusers_config(model: StoredModel, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of the Diffusers layout, for weights that are mostly in this dtype."""
    if model.kind != "text_encoder":
        return model.settings
    # transformers loads in this dtype, whatever the file holds.
    return {**model.settings, "dtype": str(dtype).removeprefix("torch.")}


def official_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a transformer's config.json of the official layout."""
    if has_timestep_per_token(settings):
        task = "ti2v"
    elif settings["in_channels"] == settings["out_channels"]:
        task = "t2v"
    else:
        task = "i2v" if settings["pos_embed_seq_len"] is None else "flf2v"
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": diffusers.__version__,
        "dim": settings["num_attention_heads"] * settings["attention_head_dim"],
        "eps": settings["eps"],
        "ffn_dim": settings["ffn_dim"],
        "freq_dim": settings["freq_dim"],
        "in_dim": settings["in_channels"],
        "model_type": task,
        "num_heads": settings["num_attention_heads"],
        "num_layers": settings["num_layers"],
        "out_dim": settings["out_channels"],
        "text_len": 512,
    }
    return config | {n: settings[n] for n, default in _OFFICIAL_DEFAULTS.items() if settings[n] != default}


def scheduler_config(shift: float) -> str:
    """Return scheduler_config.json of the Diffusers layout."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    return scheduler.to_json_string()


def model_index(source: Source, release: Preset) -> dict[str, Any]:
    """Return model_index.json of the Diffusers layout."""
    settings = source.models["transformer"].settings
    image, two = settings["in_channels"] != settings["out_channels"], "transformer_2" in source.models
    tokenizer_config = read_json(source.tokenizer / "tokenizer_config.json") if source.tokenizer else {}
    tokenizer = tokenizer_config.get("tokenizer_class")
    transformer = ["diffusers", "WanTransformer3DModel"]
    index = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": release.boundary_ratio if two else None,
        "expand_timesteps": has_timestep_per_token(settings),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast" if tokenizer in (None, "T5Tokenizer") else tokenizer],
        "transformer": transformer,
        "transformer_2": transformer if two else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    absent = {"image_encoder": [None, None], "image_processor": [None, None]}
    return index | (absent if image else {})


def lost_settings(model: StoredModel, to: str) -> list[str]:
    """Return the names of settings that a file without config.json, or an official one's, does not keep."""
    if model.kind == "text_encoder":
        return []
    settings = model.settings
    known = {name: settings[name] for name in {"attention_head_dim"} & settings.keys()}
    config = model.format.config(model.source, shapes_of(model.tensors), {}, known)
    kept = model.format.settings(config)
    if model.kind == "transformer" and to == "official":
        kept["eps"] = settings["eps"]
    elif model.kind == "transformer":
        kept["attention_head_dim"] = HEAD_DIM
    return sorted(n for n, value in kept.items() if not n.startswith("_") and settings[n] != value)


def lost_schedule(source: Source, release: Preset) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and the release's value of what a Diffusers repository says of its schedule."""
    if source.index is None:
        return
    config = read_config(source.path / "scheduler" / "scheduler_config.json", SCHEDULER)
    chosen = {"boundary_ratio": source.index.get("boundary_ratio"), "flow_shift": config.get("flow_shift")}
    for name, value in chosen.items():
        if value not in (None, official := getattr(release, name)):
            yield name, value, official
