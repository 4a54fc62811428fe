"""Every private name of PyTorch, accelerate and diffusers that wan22 uses: why, and what replaces it.

A test keeps such names out of all other files. pyproject.toml caps the libraries at the versions that this
file has been run with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Counts the bytes that are alive while a model runs on the meta device. PyTorch has no public name for it.
DispatchMode = TorchDispatchMode

# Applies a function to all tensors in arguments, for a subclass of tensors. Replaced by torch.utils.pytree,
# once all supported versions have it.
map_tree = tree_map

# Collectives within a compiled block, which run beside the next computation. Replaced by those of
# torch.distributed, once torch.compile traces them with async_op=True.
all_to_all_single = _functional_collectives.all_to_all_single
permute_tensor = _functional_collectives.permute_tensor
wait_tensor = _functional_collectives.wait_tensor

# The attention kernels one by one. Replaced by torch.nn.attention.sdpa_kernel, once its choice is the
# thread's: today two threads that enter and leave it in turn leave the restriction of one behind.
cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention
efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
flash_attention_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
math_attention = torch.ops.aten._scaled_dot_product_attention_math

# Which of them scaled_dot_product_attention runs, as a number of torch.nn.attention.SDPBackend. PyTorch has
# no public question: torch.backends.cuda.can_use_flash_attention and its sisters leave the order out.
sdpa_choice = torch._fused_sdp_choice

# Products of float8 matrices. Replaced by torch.nn.functional.scaled_mm, where torch is 2.10 or later.
scaled_mm = torch._scaled_mm

# A matrix product whose kernel ends with a bias and a GELU, on CUDA by the tanh approximation. PyTorch has no
# public name for it.
addmm_activation = torch._addmm_activation


def version(tensor: Tensor) -> int:
    """Return how often a tensor has been written to. PyTorch has no public name for it."""
    return tensor._version


def predictions_of_guider(guider: Any) -> list[str]:
    """Return the names of the predictions that one of diffusers' guiders combines; in public it only tells
    their number at a step.
    """
    return guider._input_predictions or []


def own_tensors(module: nn.Module) -> tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]:
    """Return a module's own parameters and buffers; named_parameters leaves out absent and tied ones."""
    return module._parameters, module._buffers


def own_modules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return a module's own modules, absent and repeated ones included, as Module.named_children is not."""
    return module._modules


def uncompiled(model: Any) -> Any:
    """Return the model inside what torch.compile returned. PyTorch has no public name for it."""
    return getattr(model, "_orig_mod", model)


def accelerate_hook(module: nn.Module) -> Any:
    """Return accelerate's hook on a module, or None. accelerate only adds and removes hooks in public."""
    return getattr(module, "_hf_hook", None)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see what goes into a module, or what comes out. PyTorch has no public question."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward that is not its class's."""
    return has_hooks(module) or "forward" in vars(module)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile or Module.compile is at work in a model. PyTorch has no public question."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return compiled or uncompiled(model) is not model


def attention_backend_of(layer: nn.Module) -> str | None:
    """Return diffusers' name of the kernel that was chosen for one of its attention layers, or None."""
    backend = getattr(getattr(layer, "processor", None), "_attention_backend", None)
    return getattr(backend, "value", backend)


def active_attention_backend() -> str:
    """Return the kernel of diffusers' attention_backend(...), which has no public question."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry.get_active_backend()[0].value


@contextmanager
def keeping_active_attention_backend() -> Iterator[None]:
    """Undo that diffusers' set_attention_backend of one model chooses the kernel of all others as well."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


def has_backend_of_diffusers(layer: nn.Module) -> bool:
    """Whether a layer's attention processor computes by a kernel of diffusers."""
    return hasattr(getattr(layer, "processor", None), "_attention_backend")


def choose_attention_backend(layer: Any, name: str) -> None:
    """Choose diffusers' kernel of a layer's attention processor, for which diffusers asks its own model."""
    layer.processor._attention_backend = name


def use_native_attention(model: nn.Module) -> None:
    """Let diffusers' attention layers of a copy of a model compute by PyTorch's own kernel, which its model
    does not follow. diffusers' set_attention_backend changes what the copy shares with its model.
    """
    for layer in model.modules():
        if has_backend_of_diffusers(layer):
            vars(layer)["processor"] = copy(layer.processor)
            choose_attention_backend(layer, "native")


def is_group_offloaded(model: nn.Module) -> bool:
    """Whether diffusers offloads a model in groups. diffusers has no public question."""
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    return _get_top_level_group_offload_hook(model) is not None


def reapply_group_offloading(model: nn.Module) -> None:
    """Let a model's new layers be offloaded, too. diffusers does so for its own LoRAs alone."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)


def hooks_of_diffusers(model: nn.Module) -> set[str]:
    """Return the names of diffusers' hooks in a model: offloading, step caches, layerwise casting. diffusers
    only adds and removes them in public.
    """
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return {name for registry in registries if registry is not None for name in registry.hooks}


def layerwise_casting(layer: nn.Module) -> Any:
    """Return diffusers' hook that stores a layer in one dtype and computes in another, or None. Its functions
    only attach it in public.
    """
    registry = getattr(layer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("layerwise_casting")


def take_hotswap_options(model: nn.Module) -> dict[str, Any] | None:
    """Return once what a model's `enable_lora_hotswap` was called with, or None. diffusers reads it where it
    loads the adapter itself.
    """
    options: dict[str, Any] | None = vars(model).pop("_prepare_lora_hotswap_kwargs", None)
    return options


def register_block(kind: type[nn.Module]) -> None:
    """Let diffusers' step caches find input and output of a class of blocks, in public only for its own."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(kind, TransformerBlockMetadata(return_hidden_states_index=0))


def checkpointed(model: Any, module: nn.Module, *arguments: Any) -> Any:
    """Run a module by the function that diffusers' enable_gradient_checkpointing gave to the model."""
    return model._gradient_checkpointing_func(module, *arguments)


def hooks_of(model: nn.Module) -> set[tuple[str, str]]:
    """Return the names of diffusers' hooks on a model's layers, without its own; there is no public way."""
    layers = ((name, getattr(module, "_diffusers_hook", None)) for name, module in model.named_modules())
    return {(name, hook) for name, registry in layers if name and registry for hook in registry.hooks}


def cache_config(model: Any) -> Any:
    """Return the configuration of a model's step cache, or None; in public there is only whether it is on."""
    return getattr(model, "_cache_config", None)


def attention_cache_hooks(model: nn.Module) -> list[Any]:
    """Return the hooks of diffusers' caches of attention, with a `state` and a `block_skip_range` each. They
    keep one state for all passes, where its other caches have one for each.
    """
    from diffusers.hooks.faster_cache import _FASTER_CACHE_BLOCK_HOOK
    from diffusers.hooks.pyramid_attention_broadcast import _PYRAMID_ATTENTION_BROADCAST_HOOK

    kinds = (_FASTER_CACHE_BLOCK_HOOK, _PYRAMID_ATTENTION_BROADCAST_HOOK)
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return [r.hooks[kind] for r in registries if r for kind in kinds if kind in r.hooks]


def mark_peft_layers(model: nn.Module, loaded: bool) -> None:
    """Tell diffusers' own methods of a model whether it has PEFT's layers. diffusers tells them itself only
    where it has loaded the adapter.
    """
    vars(model).pop("_hf_peft_config_loaded", None)
    if loaded:
        vars(model)["_hf_peft_config_loaded"] = True


def signature_keys(pipeline: type[Any]) -> tuple[list[str], list[str]]:
    """Return the names of a diffusers pipeline's components and of its settings. There is no public name."""
    return pipeline._get_signature_keys(pipeline)


def empty_wrapper(cls: type[Any], shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Return a tensor of a subclass on the CPU that has no memory. PyTorch has no public name for it."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))


def is_mutating(function: Any) -> bool:
    """Whether an operator of PyTorch writes to an argument. Operators tell it by private names alone."""
    return function._schema.is_mutable


def is_view(function: Any) -> bool:
    """Whether an operator of PyTorch returns another view of an argument's memory."""
    return any(value.alias_info and not value.alias_info.is_write for value in function._schema.returns)


def mark_static(tensor: Tensor) -> None:
    """Let torch.compile compile for a tensor's sizes. Replaced by torch.compile's shapes_spec, once all
    supported versions have it.
    """
    from torch._dynamo import mark_static

    mark_static(tensor)


def maybe_mark_dynamic(tensor: Tensor, axis: int) -> None:
    """Let torch.compile compile for any size of an axis, but 1. Replaced as `mark_static`."""
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, axis)


def allow_recompiling() -> None:
    """Let torch.compile compile a function for more than eight kinds of arguments: beyond, it raises, or runs
    uncompiled. Replaced by torch.compile's recompile_limit, once all supported versions have it.
    """
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, 64)
