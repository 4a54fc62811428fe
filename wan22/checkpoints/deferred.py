"""Weights that are converted when they are used, where converted ones would not fit into memory.

A deferred weight has the dtype that was asked for, its values lie in the file in another one. Each use
converts it anew, an embedding the rows that it looks up, to the same bits that conversion at loading gives;
writing to it keeps it converted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils import swap_tensors

from ..host_memory import available_ram, check_room
from ..private_apis import empty_wrapper, is_mutating, is_view, map_tree, own_tensors
from .files.quantized import QuantizedTensor, expanded

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
# They read no values of the tensor that they are given.
_SHAPES_ALONE = (
    *(torch.ops.aten.empty_like.default, torch.ops.aten.zeros_like.default, torch.ops.aten.ones_like.default),
    *(torch.ops.aten.new_empty.default, torch.ops.aten.new_zeros.default, torch.ops.aten.rand_like.default),
    torch.ops.aten.randn_like.default,
)
# Views that products take of their weights, which are not written to; through others a part may be.
_OF_PRODUCTS = (
    *(torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default),
    torch.ops.aten.expand.default,
)

_deferring = ContextVar("deferring", default=False)


class _Values:
    """What a deferred weight and its aliases share: the tensor in the file, or the converted one."""

    def __init__(self, stored: torch.Tensor | QuantizedTensor, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype
        self.written: torch.Tensor | None = None  # since it was written to
        self.stand_in: nn.Parameter | None = None

    def converted(self) -> torch.Tensor:
        return expanded(self.stored).to(self.dtype) if self.written is None else self.written

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return rows "… i" of a converted matrix, of indices "…"; no others are read."""
        stored = self.stored if self.written is None else self.written
        each = indices.flatten()
        found = stored.rows(each) if isinstance(stored, QuantizedTensor) else stored[each]
        return expanded(found).to(self.dtype).unflatten(0, indices.shape)

    def write(self) -> None:
        """Keep the converted tensor from now on, which is about to be written to."""
        if self.written is None:
            value = self.converted()
            self.written = value.clone() if value is self.stored else value


class DeferredWeight(torch.Tensor):
    """A weight that takes no memory until it is used; see the module."""

    source: _Values

    @staticmethod
    def __new__(cls, values: Any, requires_grad: bool = True) -> Any:
        """Make one that shares values with others; `deferred` makes the first.

        Of a tensor it is an ordinary parameter: accelerate makes new ones of the old ones' class.
        """
        if isinstance(values, torch.Tensor):
            return nn.Parameter(values, requires_grad)
        weight: DeferredWeight = empty_wrapper(cls, tuple(values.stored.shape), values.dtype)
        weight.source = values
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], DeferredWeight) else None
        if func in _ALIASES and first is not None:
            return DeferredWeight(first.source)
        to_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if to_meta or func in _SHAPES_ALONE:
            kwargs = {"device": "cpu"} | {name: v for name, v in kwargs.items() if v is not None}
            return func(*map_tree(_without_values, args), **kwargs)
        if func is torch.ops.aten.embedding.default and first is not None:
            return first.source.rows(args[1])
        if first is not None and (is_mutating(func) or (is_view(func) and func not in _OF_PRODUCTS)):
            first.source.write()
        result = func(*map_tree(_converted, args), **map_tree(_converted, kwargs))
        return first if first is not None and result is first.source.written else result

    @property
    def data(self) -> torch.Tensor:
        """The weight without its gradient; another tensor can be put in its place, as nn.Module.to does."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeferredWeight):
            swap_tensors(self, nn.Parameter(value, self.requires_grad))
        elif value.source is not self.source:
            self.source = value.source

    def dequantize(self) -> torch.Tensor:
        """Return the converted weight."""
        return self.source.converted()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight in its file; 0 once it was written to."""
        return self.source.stored.nbytes if self.source.written is None else 0

    def stored_values(self) -> torch.Tensor | None:
        """Return the values "n" one after the other as the file has them; None if they are quantised there.

        Those that were written to since are the converted ones.
        """
        stored = self.source.stored if self.source.written is None else self.source.written
        plain = isinstance(stored, torch.Tensor) and stored.is_contiguous()
        return stored.detach().flatten() if plain and isinstance(stored, torch.Tensor) else None

    def stand_in(self) -> nn.Parameter:
        """Return the ordinary parameter, always the same, that takes this one's place on a device."""
        if self.source.stand_in is None:
            self.source.stand_in = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        return self.source.stand_in

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            values = _Values(self.source.stored, self.source.dtype)
            if self.source.written is not None:
                values.written = self.source.written.clone()
            memo[id(self)] = nn.Parameter(DeferredWeight(values), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.dequantize(), self.requires_grad).__reduce_ex__(protocol)


@contextmanager
def deferring() -> Iterator[None]:
    """Let all weights that are loaded here be converted when they are used: a plan is made for them next."""
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


def should_defer(nbytes: int) -> bool:
    """Whether weights of so many bytes, converted, are to be deferred: in `deferring`, or for want of memory.

    Half of what is free is left for the rest of the pipeline.
    """
    return _deferring.get() or nbytes > available_ram() / 2


def deferred(stored: torch.Tensor | QuantizedTensor, dtype: torch.dtype) -> DeferredWeight:
    """Return a weight of this dtype whose values stay in the file until they are used."""
    return DeferredWeight(_Values(stored, dtype))


def deferred_weights(module: nn.Module) -> Iterator[DeferredWeight]:
    """Yield the weights of a module and of those in it that are converted when they are used."""
    return (weight for weight in module.parameters() if isinstance(weight, DeferredWeight))


def settle(module: nn.Module) -> None:
    """Convert the deferred weights of a module, and of those in it, one by one and for good.

    A MemoryError says if the host has no room for them.
    """
    if nbytes := sum(weight.nbytes for weight in deferred_weights(module)):
        check_room(nbytes, "converting all weights", "memory={'ram': …} converts them as they are used")
    for each in module.modules():
        for weight in own_tensors(each)[0].values():
            if isinstance(weight, DeferredWeight):
                weight.data = weight.dequantize()


def _converted(value: Any) -> Any:
    return value.dequantize() if isinstance(value, DeferredWeight) else value


def _without_values(value: Any) -> Any:
    if not isinstance(value, DeferredWeight):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
