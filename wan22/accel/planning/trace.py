"""Peak memory of a computation, traced on the meta device, where nothing is computed.

Counts the bytes of all tensors that are alive at once, rounded as PyTorch's allocator rounds. Workspaces of
kernels are not counted: fused attention takes next to nothing, a convolution may take more.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ...private_apis import DispatchMode
from ..offload.devices import Device, Mark
from ..offload.layout import GRAIN


class LiveBytes(DispatchMode):
    """Counts the bytes of tensors made inside it; `peak` is the largest sum of those alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._counted: Any = WeakIdKeyDictionary()
        self._alive = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # A view of an argument takes no memory.
            if id(storage) not in given and storage not in self._counted:
                self._counted[storage] = nbytes = -(-storage.nbytes() // GRAIN) * GRAIN
                self._alive += nbytes
                weakref.finalize(storage, self._free, nbytes).atexit = False
        self.peak = max(self.peak, self._alive)
        return result

    def _free(self, nbytes: int) -> None:
        self._alive -= nbytes


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


class TracedDevice(Device):
    """A device whose memory is that of the meta device; `host` counts the bytes of `allocate_host` in all."""

    torch_device = torch.device("meta")

    def __init__(self) -> None:
        self.host = 0
        self._byte = torch.empty(1, dtype=torch.uint8, device="meta")

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """See Device; takes none of the device's memory."""
        self.host += nbytes
        return self._byte.expand(nbytes)

    def release(self, buffer: torch.Tensor) -> Mark:
        """See Device."""

    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None) -> Mark:
        """See Device."""

    def wait(self, mark: Mark) -> None:
        """See Device."""

    def finish(self, mark: Mark) -> None:
        """See Device."""

    def free_bytes(self) -> int:
        """See Device; there is no limit."""
        return sys.maxsize

    def trim(self) -> None:
        """See Device."""


class FusedAttention(TorchFunctionMode):
    """Replaces PyTorch's attention, which would materialise all logits on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = given["query"], given["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def peak_bytes(function: Callable[..., Any], *args: Any, gradients: bool = False) -> int:
    """Return the most bytes that a function's meta tensors take at once, its result but not its arguments.

    `gradients`: what autograd keeps is counted, too; it is for wan22's own models.
    """
    with torch.set_grad_enabled(gradients), FusedAttention(), LiveBytes() as live:
        function(*args)
    return live.peak
