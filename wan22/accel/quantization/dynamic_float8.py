"""A linear layer that multiplies float8 by float8, with a scale per token and per output.

Shapes: l tokens, o outputs, i inputs of the layer.
"""

import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...checkpoints.files.quantized import LARGEST
from ...checkpoints.quantized_linear import QuantizedLinear
from ...models.fused import fused
from ...private_apis import scaled_mm, version

# What the float8 product asks of both sizes of a weight.
MULTIPLE = 16


class DynamicFloat8Linear(QuantizedLinear):
    """A quantised layer that rounds its input to float8, too, and multiplies float8 by float8.

    It computes as its base class does where the device has no such product, and for gradients.
    """

    method = "fp8_dynamic"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map "… i" to "… o", in the input's dtype."""
        form = _product_form(input.device)
        if form is None or input.requires_grad:
            return super().forward(input)
        compiling = torch.compiler.is_compiling()  # the compiler shares them itself
        rows, scale = _rows(input) if compiling else _shared.rows_of(input)
        weight, weight_scale = (self.parts[name] for name in ("data", "scale"))
        weight = weight.view(torch.float8_e4m3fn).t()
        # Products are bf16: in another dtype, a bias within them would be rounded with them.
        within = self.bias is not None and input.dtype == torch.bfloat16
        bias = self.bias.to(torch.bfloat16) if within else None
        out = _PRODUCTS[form](rows, weight, scale, weight_scale.reshape(1, -1), bias).to(input.dtype)
        if self.bias is not None and not within:
            out = out.add_(self.bias.to(out.dtype))
        return out.unflatten(0, input.shape[:-1])


class _SharedInput(threading.local):
    """The last input of a thread in float8, for queries, keys and values are products of the same one."""

    def __init__(self) -> None:
        self._input: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def rows_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return "l i" of "… i" in float8 and their scales "l 1"; they are kept as long as x lives."""
        if x.is_inference():  # which counts no writes
            return _rows(x)
        if self._input() is not x or self._version != version(x) or self._found is None:
            self._found = None  # before the next ones are made
            self._found = _rows(x)
            self._input, self._version = weakref.ref(x, self._forget), version(x)
        return self._found

    def _forget(self, reference: Any) -> None:
        if reference is self._input:
            self._found = None


_shared = _SharedInput()


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, scale = _per_token_float8(x.flatten(0, -2)[None])
    return rows[0], scale[0]


@fused
def _per_token_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return "1 l i" in float8, and the scale of each token, "1 l 1" in float32."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    # In the dtype of x, so that no float32 copy of x is made. The scale is the inverse of the rounded factor,
    # so that it costs nothing: 3.71e-2 against 3.69e-2 in bf16. The bound keeps float16 finite.
    factor = LARGEST[torch.float8_e4m3fn] / largest.clamp_min(500 / torch.finfo(x.dtype).max)
    return (x * factor).to(torch.float8_e4m3fn), factor.float().reciprocal()


def _scaled_by_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply "l i" by "i o" with scales "l 1" and "1 o", and add a bias "o" in bf16.

    It is one kernel, from compute capability 9.0.
    """
    return scaled_mm(
        x, weight, scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda
    )


def _scaled_afterwards(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do the same where kernels take one scale for all, as on 8.9: both scales factor out of the sums."""
    one = torch.ones((), device=x.device)
    out = scaled_mm(x, weight, one, one, out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda)
    out = out.mul_(scale).mul_(weight_scale)
    return out if bias is None else out.add_(bias)


_PRODUCTS = {"by rows": _scaled_by_rows, "afterwards": _scaled_afterwards}


@torch.compiler.assume_constant_result
def _product_form(device: torch.device) -> str | None:
    # On the meta device the memory of an expanded weight is counted, which is the larger.
    return None if device.type == "meta" else _tried_form(device)


@cache
@torch.no_grad()
def _tried_form(device: torch.device) -> str | None:
    """Try the products, for PyTorch's version decides as well which kernels exist."""
    x = torch.ones(MULTIPLE, MULTIPLE, device=device).to(torch.float8_e4m3fn)
    scale = torch.full((MULTIPLE, 1), 0.5, device=device)
    bias = torch.ones(MULTIPLE, dtype=torch.bfloat16, device=device)
    for name, product in _PRODUCTS.items():
        try:
            out = product(x, x.t(), scale, scale.t(), bias)
        except (RuntimeError, ValueError):
            continue
        if bool((out == MULTIPLE / 4 + 1).all()):
            return name
    return None
