"""A linear layer whose weight stays quantised, and is expanded at each call.

Shapes: o outputs, i inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .files.quantized import FLOAT8, QuantizedTensor

_expanding = ContextVar("expanding", default=False)  # see expanded_state


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight "o i" is expanded at each call, in float32 and then to the input's dtype.

    `dtype` is that of the `weight` property.
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
        """The tensors that are stored for the weight."""
        return {name: getattr(self, name) for name in self._parts}

    @property
    def method(self) -> str:
        """How the weight is quantised, in words: "fp8", "Q4_K"."""
        return self.format.name

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
        # The values stay rounded, which recipes tell.
        vars(linear)["expanded_from"] = f"{self.method}, expanded"
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


def check_has_float8(model: nn.Module, device: torch.device) -> None:
    """Refuse a device without float8 for a model that is quantised to it, by a ValueError."""
    if device.type != "mps":
        return
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and getattr(layer.format, "kind", None) in FLOAT8:
            raise ValueError(
                f"{type(model).__name__} is quantised to {layer.method}, and MPS has no float8; load it in "
                "bf16, or quantise it to 'int8'"
            )


@contextmanager
def expanded_state() -> Iterator[None]:
    """Let state dicts hold ordinary weights in place of quantised ones, for any program to read."""
    token = _expanding.set(True)
    try:
        yield
    finally:
        _expanding.reset(token)
