"""Models without weights, on the meta device: what a plan is made of before anything is loaded."""

import functools
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...checkpoints.loading.dtypes import dtype_for
from ...checkpoints.loading.fill import empty_weights
from ...checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ...presets import Preset

MODELS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")

# Layers and the feed-forward's size of the released transformers, by model size.
_DEPTHS = {5120: (40, 13824), 3072: (30, 14336), 1536: (30, 8960)}
_UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_CLIP_VIT_H: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
VAE_22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def released_models(preset: Preset) -> dict[str, Any]:
    """Return a released checkpoint's models as its repository stores them: bf16, the VAE in float32."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    layers, ffn_dim = _DEPTHS[preset.dim]
    outputs = 48 if preset.in_channels == 48 else 16
    wan21_image = preset.in_channels == 36 and preset.boundary_ratio is None
    config: dict[str, Any] = {
        "num_attention_heads": preset.dim // 128,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "in_channels": preset.in_channels,
        "out_channels": outputs,
    }
    if wan21_image:
        config |= {"image_dim": 1280, "added_kv_proj_dim": preset.dim}
        config |= {"pos_embed_seq_len": 514 if preset.two_frames else None}
    with empty_weights():
        text = UMT5EncoderModel(UMT5Config(**_UMT5_XXL))
        models = {"text_encoder": text, "transformer": WanTransformer3DModel(**config)}
        if preset.boundary_ratio is not None:
            models["transformer_2"] = WanTransformer3DModel(**config)
        if wan21_image:
            models["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**_CLIP_VIT_H))
        vae = AutoencoderKLWan(**VAE_22) if outputs == 48 else AutoencoderKLWan()
    for model in models.values():
        store_as(model, torch.bfloat16)
    return {**models, "vae": vae}


def store_as(model: nn.Module, dtype: torch.dtype, stored: torch.dtype | None = None) -> None:
    """Give a model's parameters a dtype, but those that a transformer keeps in float32.

    Args:
        model: on the meta device.
        dtype: that is asked for.
        stored: that of the files; None: the same.
    """
    kept = (
        set(WanTransformer3DModel._keep_in_fp32_modules)
        if isinstance(model, WanTransformer3DModel)
        else set()
    )
    for path, parameter in model.named_parameters():
        owner = model.get_submodule(path.rpartition(".")[0])
        parameter.data = parameter.data.to(dtype_for(owner, path, stored or dtype, dtype, kept))


def outline(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of a pipeline's models without their weights, LoRAs and quantised layers included."""
    return {name: meta_copy(components[name]) for name in MODELS if components.get(name) is not None}


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a module whose parameters and buffers become meta tensors; tied ones stay tied.

    Hooks, and methods that were put on a module from outside, are left behind.
    """
    known: dict[int, Any] = {}

    def bare(module: nn.Module) -> nn.Module:
        if id(module) in known:
            return known[id(module)]
        twin = known[id(module)] = module.__class__.__new__(module.__class__)
        twin.__dict__.update({k: v for k, v in vars(module).items() if not _is_attached(k, v)})
        twin.__dict__ |= {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
        for kind in ("_parameters", "_buffers"):
            twin.__dict__[kind] = {
                name: _meta(tensor, known) for name, tensor in module.__dict__[kind].items()
            }
        twin.__dict__["_modules"] = {
            name: None if child is None else bare(child) for name, child in module._modules.items()
        }
        return twin

    return bare(model)


def _is_attached(name: str, value: Any) -> bool:
    return isinstance(value, MethodType | functools.partial) or name == "_hf_hook"


def _meta(tensor: torch.Tensor | None, known: dict[int, Any]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in known:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        known[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        )
    return known[id(tensor)]
