"""Layers that are stored in one dtype and compute in another: diffusers' layerwise casting."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...private_apis import layerwise_casting
from ..quantized_linear import QuantizedLinear


def store_as_computed(layer: nn.Module) -> None:
    """Keep a layer's weights in the dtype it computes in, so that what is added to them is not rounded."""
    if (casting := layerwise_casting(layer)) is not None:
        casting.storage_dtype = casting.compute_dtype
        layer.to(casting.compute_dtype)


def is_narrow(layer: nn.Module) -> bool:
    """Whether a layer's weights are stored in another dtype than it computes in."""
    casting = layerwise_casting(layer)
    return casting is not None and casting.storage_dtype != casting.compute_dtype


@contextmanager
def computing(layers: Iterable[nn.Module], expand: bool = False) -> Iterator[None]:
    """Let PEFT see the dtype that cast layers compute in, while it puts adapters around them.

    `expand`: have the weights themselves in it, too, for what PEFT computes from them.
    """
    cast = [(layer, casting) for layer in layers if (casting := layerwise_casting(layer)) is not None]
    for layer, casting in cast:
        vars(layer)["compute_dtype"] = casting.compute_dtype  # where PEFT looks first
        if expand:
            layer.to(casting.compute_dtype)
    try:
        yield
    finally:
        for layer, casting in cast:
            del vars(layer)["compute_dtype"]
            layer.to(casting.storage_dtype)  # exact: they are values of it


def compute_dtype_of(layer: Any) -> torch.dtype:
    """Return the dtype that a linear layer's adapters have: that of its computation."""
    if isinstance(layer, QuantizedLinear):
        return layer.dtype  # its weight would be expanded
    casting = layerwise_casting(layer)
    return layer.weight.dtype if casting is None else casting.compute_dtype
