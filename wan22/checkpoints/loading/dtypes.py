"""Which dtype each weight gets in a model of a dtype."""

from collections.abc import Iterable

import torch
from torch import nn

from ...models.layers import Float32Linear
from ..files.quantized import HALF
from .quantized_linear import QuantizedLinear


def dtype_for(
    owner: nn.Module, name: str, stored: torch.dtype, asked: torch.dtype, in_float32: Iterable[str]
) -> torch.dtype:
    """Return the dtype that a weight `name` of the module `owner` gets in a model of the dtype asked for.

    In a half-precision model, the modules and parameters named in `in_float32` are float32. Where the module
    widens a weight in the computation, it keeps a half precision that it is stored in: the same numbers, and
    0.37 GB less for an expert of A14B.
    """
    if asked not in HALF or set(in_float32).isdisjoint(name.split(".")):
        return asked
    return stored if stored in HALF and isinstance(owner, Float32Linear) else torch.float32


def dtypes_in(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return by name the dtypes that a model's weights would have if it had been loaded in a dtype.

    The model is not quantised; None stands for the dtype that each weight has.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {
        name: dtype_for(model.get_submodule(name.rpartition(".")[0]), name, weight.dtype, dtype, kept)
        if dtype
        else weight.dtype
        for name, weight in model.named_parameters()
    }


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's weights the dtypes that they have after loading in a dtype, one by one and in place."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        model.to(dtype)
        return
    targets = dtypes_in(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(targets[name])
