"""Which dtype and device a caller asks for, and which one each weight gets in a model of it."""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...checks import cut, shown
from ...models.layers import Float32Linear
from ..files.quantized import FLOAT8, HALF
from ..quantized_linear import QuantizedLinear

# Names of dtypes, also with "torch." before them.
NAMES = {
    **{"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32},
    **{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "float64": torch.float64},
}
AS_STORED = "auto"


def read_dtype(dtype: Any, argument: str = "dtype") -> torch.dtype | None:
    """Return the dtype that an argument of a loader names; None, for None and "auto": as stored.

    A name is like "bfloat16", "torch.bfloat16" or "bf16". A ValueError names the nearest, and says that
    weights of this dtype cannot be computed with; a TypeError that it is no dtype.
    """
    if isinstance(dtype, str) and dtype != AS_STORED:
        name = dtype.strip().lower().removeprefix("torch.")
        found = NAMES.get(name, getattr(torch, name, None))  # float8, which torch has, is refused below
        if not isinstance(found, torch.dtype):
            near = difflib.get_close_matches(dtype.lower(), [*NAMES, AS_STORED], 1, 0.3) or ["bfloat16"]
            rule = f"must be a dtype of torch, its name, or {AS_STORED!r}; the nearest is {shown(near[0])}"
            raise ValueError(f"{argument}={dtype[:80]!r} {rule}")
        dtype = found
    if dtype is None or dtype == AS_STORED:
        return None
    if not isinstance(dtype, torch.dtype):
        rule = "must be a dtype of torch, or its name"
        raise TypeError(f"{argument}={str(dtype)[:80]} is a {type(dtype).__name__}; it {rule}")
    if dtype not in NAMES.values():
        advice = (
            "; call enable_layerwise_casting after loading, or keep the file in float8"
            if dtype in FLOAT8
            else "; the nearest is torch.bfloat16"
        )
        raise ValueError(f"{argument}={dtype}: models do not compute in it{advice}")
    return dtype


def read_device(device: Any, argument: str = "device") -> torch.device:
    """Return the device that an argument names; a ValueError says that it is none of torch's."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        kind = cut(device).partition(":")[0]
        known = ("cpu", "cuda", "mps", "xpu")
        near = ["cuda"] if kind.lower() == "gpu" else difflib.get_close_matches(kind, known, 1, 0.5)
        hint = f"; the nearest is {shown(near[0])}" if near else ""
        rule = f"must be a device of torch, such as 'cpu' or 'cuda:1'{hint}"
        raise ValueError(f"{argument}={shown(device)} {rule}") from None  # torch repeats it in full


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
