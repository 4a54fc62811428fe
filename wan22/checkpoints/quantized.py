"""Weights in fewer bytes than their values: scaled float8 and int8, and GGUF's blocks.

Shapes: o outputs, i inputs of a linear layer, g groups of inputs with a scale of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF = (torch.float16, torch.bfloat16)
FLOAT32_FIRST = ("cpu",)  # devices that are slower at products in a half dtype

_expanding = ContextVar("expanding", default=False)  # see expanded_state
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ScaledNumbers:
    """Float8 or int8 numbers, kept as bytes, times a scale.

    Args:
        kind: the dtype of the numbers.
        groups: groups of inputs with a scale of their own; None for one scale for all.
    """

    kind: torch.dtype
    groups: int | None

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values: products in float32, rounded once to a dtype."""
        data, scale = parts["data"], parts["scale"]
        # The numbers are exact in the half dtypes, too, and a product in place with a float32 tensor of at
        # least one dimension is computed in float32 and rounded once: the same values, with a third of the
        # memory traffic.
        direct = dtype in HALF and data.device.type not in FLOAT32_FIRST
        values = data.view(self.kind).to(dtype if direct else torch.float32)
        if self.groups is None:
            values.mul_(scale.reshape(1))
        else:
            values.unflatten(1, (self.groups, -1)).mul_(scale)
        return values.to(dtype)


@dataclass(frozen=True)
class GgufBlocks:
    """Blocks of GGUF.

    Args:
        kind: name of their type, such as "Q4_K".
        shape: of the tensor.

    Raises:
        ValueError: there is no way to read blocks of this type.
    """

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _ = self._reader  # refused now rather than at the first call

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values, computed in float32, in a dtype."""
        block, size, function = self._reader
        values = function(parts["data"].reshape(-1, size), block, size, dtype=torch.float32)
        return values.reshape(self.shape).to(dtype)

    @cached_property
    def _reader(self) -> tuple[int, int, Callable[..., torch.Tensor]]:
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions

        number = gguf.GGMLQuantizationType[self.kind]
        if number not in dequantize_functions:
            known = ", ".join(sorted(n.name for n in dequantize_functions))
            raise ValueError(f"blocks of type {self.kind} cannot be read; these can: {known}")
        return *gguf.GGML_QUANT_SIZES[number], dequantize_functions[number]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in fewer bytes than its values.

    Args:
        shape: of the values.
        format: how the parts make up the values.
        parts: the tensors that are stored for it.
    """

    shape: tuple[int, ...]
    format: ScaledNumbers | GgufBlocks
    parts: Parts

    def expand(self) -> torch.Tensor:
        """Return the values in float32."""
        return self.format.expand(self.parts)


def scaled_float8(data: torch.Tensor, scale: torch.Tensor | None) -> QuantizedTensor:
    """Return a float8 tensor that is to be multiplied by a scale.

    Args:
        data: float8.
        scale: one number; for data of "o i" also "o", "o 1" or "o g 1"; None for 1.

    Raises:
        ValueError: the scale is of another shape.
    """
    scale = torch.ones(()) if scale is None else scale.float()
    shape, groups = tuple(data.shape), None
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif len(shape) == 2 and tuple(scale.shape) in ((shape[0],), (shape[0], 1)):
        scale, groups = scale.reshape(-1, 1, 1), 1
    elif (
        len(shape) == 2
        and scale.ndim == 3
        and scale.shape[::2] == (shape[0], 1)
        and not shape[1] % scale.shape[1]
    ):
        groups = scale.shape[1]
    else:
        raise ValueError(
            f"the scale has shape {tuple(scale.shape)}; a weight of shape {shape} may have one number, or "
            "one per output or per group of an output's inputs"
        )
    parts = {"data": data.view(torch.uint8), "scale": scale}
    return QuantizedTensor(shape, ScaledNumbers(data.dtype, groups), parts)


def expanded(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    """Return a tensor as an ordinary one; a quantised one in float32."""
    return tensor.expand() if isinstance(tensor, QuantizedTensor) else tensor


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is expanded at each call, in float32 and then to the input's dtype.

    Args:
        weight: "o i".
        bias: "o", or None.
        dtype: that the layer has for those who ask for its weight.
    """

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias is not None, device="meta")
        del self.weight
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.format, self.dtype, self._parts = weight.format, dtype, tuple(weight.parts)
        for name, part in weight.parts.items():  # as parameters, so that they are offloaded like any weight
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """What is stored for the weight."""
        return {name: getattr(self, name) for name in self._parts}

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the expanded weight, "o i" in a dtype, computed anew."""
        return self.format.expand(self.parts, dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The expanded weight, "o i" in the layer's dtype, computed anew."""
        return self.values(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map "… i" to "… o", in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.values(input.dtype), bias)

    def expand(self) -> nn.Linear:
        """Return an ordinary layer with the expanded weight, in the layer's dtype."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(self.dtype), requires_grad=False)
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not _expanding.get():
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast of the model moves the parts, but does not round the scale.
        kept = {name: part.data for name, part in self.parts.items()}
        super()._apply(fn, recurse)
        for name, part in kept.items():
            moved = getattr(self, name)
            if moved.dtype != part.dtype:
                moved.data = part.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


@contextmanager
def expanded_state() -> Iterator[None]:
    """Let state dicts hold ordinary weights in place of quantised ones, for any program to read."""
    token = _expanding.set(True)
    try:
        yield
    finally:
        _expanding.reset(token)
