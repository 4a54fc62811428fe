"""Faster products and convolutions on the CPU: oneDNN's, with the GELU behind one of them inside.

PyTorch chooses BLAS for float32 products, and for small float32 convolutions of one clip a loop that is up
to ten times slower.

Shapes: i inputs, o outputs of a linear layer; b batch, c channels, t h w frames, rows and columns.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from ..models.layers import GELU

_DTYPES = (torch.float32, torch.bfloat16)
# Weights of a layer from which on it pays: below, calling oneDNN takes longer than a product, and bringing a
# convolution's weight into its order, which it does at each call, next to nothing.
_LARGE = 2**20
_PACKED = "_onednn_weight"


def accelerate(model: nn.Module) -> None:
    """Let a model's large linear layers and its convolutions run in oneDNN, on the CPU and without gradients.

    A transformer block's result moves by less than 1e-6 of its norm in float32, a VAE's by less than 3e-6. In
    bfloat16 only the GELU in the feed-forward rounds once less: it moves by less than 2e-3, no more than
    bfloat16 is off anyway.

    The weights of large convolutions are kept in oneDNN's own order as well, in as much memory again, if the
    model runs on the CPU now.

    Args:
        model: its weights loaded; changed in place. Quantised layers stay as they are.
    """
    detach(model)
    if not torch.backends.mkldnn.is_available():
        return
    on_cpu = get_module_execution_device(model).type == "cpu"
    for module, name, function in _replacements(model):
        # Past nn.Module's own attributes: these are no parameters, modules or buffers.
        vars(module)[name] = MethodType(function, module)
        if on_cpu and isinstance(module, nn.Conv3d) and (packed := _pack(module)) is not None:
            vars(module)[_PACKED] = packed


def detach(model: nn.Module) -> None:
    """Undo `accelerate`: results are those of the plain model, to the bit."""
    for module, name, function in _replacements(model):
        if getattr(vars(module).get(name), "__func__", None) is function:
            del vars(module)[name]
            vars(module).pop(_PACKED, None)


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that `accelerate` keeps in oneDNN's order as well."""
    packed = [vars(module)[_PACKED] for module in model.modules() if _PACKED in vars(module)]
    return sum(weight.numel() * weight.element_size() for weight in packed)


def _replacements(model: nn.Module) -> Iterable[tuple[nn.Module, str, Callable[..., torch.Tensor]]]:
    """Yield modules, the names of their methods, and what takes their place."""
    for module in model.modules():
        if type(module) is nn.Linear and module.in_features * module.out_features >= _LARGE:
            yield module, "forward", _linear
        elif type(module) is GELU and module.approximate == "tanh":
            yield module, "forward", _gelu
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and module.padding_mode == "zeros":
            yield module, "_conv_forward", _convolution


def _linear(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Map "… i" to "… o"."""
    if not _fits(layer, input):
        return F.linear(input, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(input, layer.weight, layer.bias, "none", [], "")


def _gelu(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Map "… i" to "… o", and then through GELU."""
    small = layer.proj.in_features * layer.proj.out_features < _LARGE
    if (
        small or type(layer.proj) is not nn.Linear or not _fits(layer.proj, input)
    ):  # quantised, or with a LoRA
        return type(layer).forward(layer, input)
    return torch.ops.mkldnn._linear_pointwise(input, layer.proj.weight, layer.proj.bias, "gelu", [], "tanh")


def _convolution(
    layer: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Map "b c t h w", or "b c h w", as `_conv_forward` of PyTorch's convolutions does."""
    packed = vars(layer).get(_PACKED)
    # Half types run in oneDNN anyway, and the compiler finds the way there by itself.
    if (packed is None and input.dtype != torch.float32) or torch.compiler.is_compiling():
        return type(layer)._conv_forward(layer, input, weight, bias)
    if not _fits(layer, input):
        return type(layer)._conv_forward(layer, input, weight, bias)
    sizes = layer.padding, layer.stride, layer.dilation, layer.groups
    if packed is None or weight is not layer.weight:
        return torch.ops.aten.mkldnn_convolution(input, weight, bias, *sizes)
    return torch.ops.mkldnn._convolution_pointwise(input, packed, bias, *sizes, "none", [], "")


def _pack(layer: nn.Conv3d) -> torch.Tensor | None:
    """Return a convolution's weight in oneDNN's order, if it is large and on the CPU."""
    weight = layer.weight.detach()
    if weight.numel() < _LARGE or weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return None
    # The order depends little on the input's size; another one's works as well.
    size = (1, layer.in_channels, 2 + layer.kernel_size[0], 32, 32)
    sizes = layer.padding, layer.stride, layer.dilation, layer.groups
    reorder: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
    return reorder(weight.contiguous().to_mkldnn(), *sizes, size)


def _fits(layer: Any, input: torch.Tensor) -> bool:
    """Whether oneDNN computes this: on the CPU, in one dtype it has, and nobody asks for gradients."""
    weight = layer.weight
    return (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype
        and input.dtype in _DTYPES
        and type(weight) is nn.Parameter
        and not torch.is_grad_enabled()
    )
