"""Models on the meta device: of released checkpoints, and copies of loaded models without their weights."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...checkpoints.loading.dtypes import dtype_for
from ...checkpoints.loading.fill import empty_weights
from ...checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ...presets import Preset
from ...private_apis import own_modules, uncompiled
from ..offload.layout import blocks_of, mark_where_it_lies

MODELS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")

# Layers and the feed-forward's size of the released transformers, by model size.
_DEPTHS = {5120: (40, 13824), 3072: (30, 14336), 1536: (30, 8960)}
_UMT5_XXL: dict[str, Any] = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240}
_UMT5_XXL |= {"num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_CLIP_VIT_H: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_CLIP_VIT_H |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
VAE_22: dict[str, Any] = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
VAE_22 |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
VAE_22 |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}


def released_models(preset: Preset, stored: Mapping[str, torch.dtype] | None = None) -> dict[str, Any]:
    """Return a released checkpoint's models on the meta device.

    `stored` has dtypes of its files by component name; default is bfloat16, and float32 for the VAE.
    """
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
        models["vae"] = AutoencoderKLWan(**VAE_22) if outputs == 48 else AutoencoderKLWan()
    dtypes = dict.fromkeys(models, torch.bfloat16) | {"vae": torch.float32} | dict(stored or {})
    for name, model in models.items():
        store_as(model, dtypes[name])
    return models


def store_as(model: nn.Module, dtype: torch.dtype, stored: torch.dtype | None = None) -> None:
    """Give a meta model the dtypes that weights of dtype `stored`, else `dtype`, have loaded as `dtype`."""
    kept = model._keep_in_fp32_modules if isinstance(model, WanTransformer3DModel) else ()
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        parameter.data = parameter.data.to(dtype_for(owner, name, stored or dtype, dtype, kept))


def meta_copies(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta copies of a pipeline's models, by component name."""
    return {name: meta_copy(components[name]) for name in MODELS if components.get(name) is not None}


def meta_copy(
    model: nn.Module,
    blocks: int | None = None,
    first: int = 0,
    dtypes: Mapping[str, torch.dtype] | None = None,
    attached: bool = False,
) -> Any:
    """Copy a model without its weights: parameters and buffers become meta tensors; tied ones stay tied.

    Other attributes are shared with the model, which stays as it is; quantised layers and LoRAs are included.
    The copy has no gradients.

    Args:
        model: any model, compiled ones included.
        blocks: how many of its blocks the copy has; None: all.
        first: number of the first block that it has.
        dtypes: dtypes of all the copy's parameters by name; None: the model's.
        attached: whether hooks and patched methods are copied; otherwise they are left behind.
    """
    model = uncompiled(model)
    kept = slice(first, None if blocks is None else first + blocks)
    left_out = {*map(id, blocks_of(model))} - {*map(id, blocks_of(model)[kept])}
    dtype_of = {id(p): dtypes[name] for name, p in model.named_parameters()} if dtypes else {}
    copies: dict[int, Any] = {}  # by the original's id

    def once(original: Any, make: Callable[[Any], Any]) -> Any:
        if original is not None and id(original) not in copies:
            copies[id(original)] = make(original)
        return copies.get(id(original))

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        dtype = dtype_of.get(id(tensor), tensor.dtype)
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=False)
        if dtype == tensor.dtype:
            mark_where_it_lies(meta, tensor)
        return meta

    def bare(module: nn.Module) -> nn.Module:
        twin = module.__class__.__new__(module.__class__)
        own = {name: value for name, value in vars(module).items() if not _is_hook(name, value)}
        for name, value in vars(module).items():
            if isinstance(value, dict) and "_hooks" in name:
                own[name] = type(value)(value if attached else ())
            elif isinstance(value, MethodType) and attached:
                own[name] = MethodType(value.__func__, twin if value.__self__ is module else value.__self__)
        for kind in ("_parameters", "_buffers"):
            own[kind] = {name: once(tensor, empty) for name, tensor in own[kind].items()}
        children = {name: child for name, child in own_modules(module).items() if id(child) not in left_out}
        own["_modules"] = {name: once(child, bare) for name, child in children.items()}
        vars(twin).update(own)
        return twin

    return bare(model)


def _is_hook(name: str, value: Any) -> bool:
    """Whether an attribute was put on a module from outside: a patched method or what moves its weights."""
    return isinstance(value, MethodType | partial) or name in ("_hf_hook", "_compiled_call_impl")
