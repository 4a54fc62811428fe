"""The device beside the host, of whatever make, and how results come from it without stalling it."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

# Devices whose copies to the host run in the background, in the order of their streams.
_WITH_STREAMS = ("cuda", "xpu")
T = TypeVar("T")


class HostCopies(Generic[T]):
    """Copies of tensors to the host, in order, each of which is waited for once the next one is queued.

    So the device always has work while the host waits. On the CPU, and on devices that copy in no other way
    than at once, nothing is on its way, and each is there as soon as it is put in.

    Args:
        device: the tensors' device.
    """

    def __init__(self, device: torch.device) -> None:
        self._in_background = device.type in _WITH_STREAMS
        self._queue: deque[tuple[T, tuple[torch.Tensor, ...], torch.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, what: T, *tensors: torch.Tensor) -> None:
        """Queue a copy of tensors, of which `what` says what they are."""
        if not self._in_background:
            self._queue.append((what, tuple(tensor.cpu() for tensor in tensors), None))
            return
        # PyTorch pins the memory, and keeps it for the next copy once the tensor is gone.
        copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        event = torch.accelerator.current_stream(tensors[0].device).record_event()
        self._queue.append((what, copies, event))

    def arrived(self) -> Iterator[tuple[T, tuple[torch.Tensor, ...]]]:
        """Yield what can be read without stalling the device: all but the one that was put in last."""
        while len(self._queue) > (1 if self._in_background else 0):
            yield self._next()

    def rest(self) -> Iterator[tuple[T, tuple[torch.Tensor, ...]]]:
        """Yield all that is left; the device may have nothing else to do meanwhile."""
        while self._queue:
            yield self._next()

    def _next(self) -> tuple[T, tuple[torch.Tensor, ...]]:
        what, copies, event = self._queue.popleft()
        if event is not None:
            event.synchronize()
        return what, copies
