"""What a computation costs, told from its shapes: it runs on the meta device, where nothing is computed.

Counted are the bytes of all tensors that are alive at once, as PyTorch's allocator would hand them out. What
kernels take for themselves is not: fused attention takes next to nothing, a convolution may take more.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..offload.layout import GRAIN


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it; `peak` is the most that were alive at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: Any = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # A view of something made before is nothing new.
            if id(storage) not in given:
                self._alive[storage] = -(-storage.nbytes() // GRAIN) * GRAIN
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class FusedAttention(TorchFunctionMode):
    """Lets PyTorch's attention return at once; on the meta device it would lay out all logits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def peak_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return the most bytes that a function's tensors take at once, its results included.

    Args:
        function: makes all its tensors on the meta device.
        *args: for the function; tensors made before do not count.
        **kwargs: likewise.
    """
    with torch.no_grad(), FusedAttention(), LiveBytes() as live:
        function(*args, **kwargs)
    return live.peak


def on_meta(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model with its weights on the meta device; the model stays as it is."""
    weights: Mapping[str, torch.Tensor] = {
        name: tensor.detach().to("meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, weights, args, kwargs)  # type: ignore[arg-type]

    return call
