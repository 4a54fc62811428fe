"""Faster products and convolutions on the CPU: oneDNN's, with the GELU behind one of them inside.

PyTorch chooses BLAS for float32 products, and for small float32 convolutions of one clip a loop that is up
to ten times slower.

Shapes: i inputs, o outputs of a linear layer; b batch, c channels, t h w frames, rows and columns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..models.layers import GELU
from .methods import identity, is_own, patch_method

_DTYPES = (torch.float32, torch.bfloat16)
# Weights of a layer from which on it pays: below, calling oneDNN takes longer than a product, and bringing a
# convolution's weight into its order, which it does at each call, next to nothing.
_LARGE = 2**20
# The attribute that switches a module's function on: it holds its weight in oneDNN's order, or None.
_FLAG = "_onednn"


@dataclass
class Packed:
    """A convolution's weight in oneDNN's order.

    Args:
        weight: it.
        state: of the weight that it was made from, then.
    """

    weight: torch.Tensor
    state: Any

    def serves(self, weight: torch.Tensor) -> bool:
        """Whether it was made from this weight, and that is as it was."""
        return _state(weight) == self.state

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing, as a copied layer has a weight of its own."""


def accelerate(model: nn.Module) -> None:
    """Let a model's large linear layers and its convolutions run in oneDNN, on the CPU and without gradients.

    A transformer block's result moves by less than 1e-6 of its norm in float32, a VAE's by less than 3e-6. In
    bfloat16 only the GELU in the feed-forward rounds once less: it moves by less than 2e-3, no more than
    bfloat16 is off anyway.

    The weights of large convolutions are kept in oneDNN's own order as well, in as much memory again. Where a
    weight has changed since, that layer runs without, until this is called again.

    Args:
        model: its weights loaded; changed in place. One that runs elsewhere stays as it is, and so do
            quantised layers and those that somebody else has hooks on, an offload say.
    """
    if not torch.backends.mkldnn.is_available() or get_module_execution_device(model).type != "cpu":
        detach(model)
        return
    for module, name, function in _replacements(model):
        if is_own(module, name) or _is_ours(module, name, function):
            patch_method(module, name, function)
        elif _FLAG not in vars(module):  # or else this is inside of what somebody put around it since
            continue
        # Past nn.Module's own attributes: this is no parameter, module or buffer.
        vars(module)[_FLAG] = _pack(module) if isinstance(module, nn.Conv3d) else None


def detach(model: nn.Module) -> None:
    """Undo `accelerate`: results are those of the plain model, to the bit."""
    for module, name, function in _replacements(model):
        # Inside of what somebody put around it since, a function stays, and computes as the class does.
        vars(module).pop(_FLAG, None)
        if _is_ours(module, name, function):
            del vars(module)[name]


def _is_ours(module: nn.Module, name: str, function: Callable[..., torch.Tensor]) -> bool:
    """Whether a function is in a method's place."""
    return getattr(vars(module).get(name), "__func__", None) is function


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that `accelerate` keeps in oneDNN's order as well."""
    packed = [vars(module).get(_FLAG) for module in model.modules()]
    return sum(p.weight.numel() * p.weight.element_size() for p in packed if p is not None)


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
    if _FLAG not in vars(layer) or not _fits(layer, input):
        return F.linear(input, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(input, layer.weight, layer.bias, "none", [], "")


def _gelu(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Map "… i" to "… o", and then through GELU."""
    proj = layer.proj
    large = proj.in_features * proj.out_features >= _LARGE
    # Otherwise quantised, or with a LoRA.
    plain = type(proj) is nn.Linear and not hasattr(proj, "_hf_hook") and not hasattr(proj, "_diffusers_hook")
    if _FLAG not in vars(layer) or not (large and plain and _fits(proj, input)):
        return type(layer).forward(layer, input)
    return torch.ops.mkldnn._linear_pointwise(input, proj.weight, proj.bias, "gelu", [], "tanh")


def _convolution(
    layer: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Map "b c t h w", or "b c h w", as `_conv_forward` of PyTorch's convolutions does."""
    # The compiler finds the way there by itself.
    if torch.compiler.is_compiling() or _FLAG not in vars(layer) or not _fits(layer, input):
        return type(layer)._conv_forward(layer, input, weight, bias)
    packed, sizes = vars(layer)[_FLAG], (layer.padding, layer.stride, layer.dilation, layer.groups)
    if packed is not None and packed.serves(weight):
        return torch.ops.mkldnn._convolution_pointwise(input, packed.weight, bias, *sizes, "none", [], "")
    if input.dtype != torch.float32:  # half types run in oneDNN anyway
        return type(layer)._conv_forward(layer, input, weight, bias)
    return torch.ops.aten.mkldnn_convolution(input, weight, bias, *sizes)


def _pack(layer: nn.Conv3d) -> Packed | None:
    """Return a convolution's weight in oneDNN's order, if it is large and on the CPU."""
    weight = layer.weight
    # One of another class is divided among ranks, and put together for each use.
    whole = type(weight) is nn.Parameter and weight.device.type == "cpu"
    if weight.numel() < _LARGE or not whole or weight.dtype not in _DTYPES:
        return None
    # The order depends little on the input's size; another one's works as well.
    size = (1, layer.in_channels, 2 + layer.kernel_size[0], 32, 32)
    sizes = layer.padding, layer.stride, layer.dilation, layer.groups
    reorder: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
    ordered = reorder(weight.detach().contiguous().to_mkldnn(), *sizes, size)
    return Packed(ordered, _state(weight))


def _state(weight: torch.Tensor) -> Any:
    """Return what changes when a weight is written to, or lies in other memory, as after a cast."""
    return identity(weight), StorageWeakRef(weight.untyped_storage())


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
