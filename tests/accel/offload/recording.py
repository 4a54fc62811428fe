"""A stand-in for a GPU: slow, and it records what happens."""

import threading
from collections import deque
from dataclasses import dataclass

import torch

from wan22.accel.offload.devices import Device, Mark, host_bytes
from wan22.accel.offload.transfer import Loader


@dataclass(frozen=True)
class Record:
    """Something that happened on a RecordingDevice.

    Args:
        kind: "allocate", "free", "release", "copy" (queued) or "arrive" (copied).
        what: the name of the block that is copied, where a loader is watched.
        nbytes: how many.
    """

    kind: str
    what: str
    nbytes: int


@dataclass(frozen=True)
class _Point:
    """A RecordingDevice's mark: its number in the order of all, and the address of the buffer it is about."""

    number: int
    address: int


class RecordingDevice(Device):
    """Host memory that behaves like a device as slow as the rules allow, and records what happens.

    A copy arrives when it is waited for, not before. Memory is filled with NaN as soon as it is released:
    whoever computes without waiting, or after the release, gets NaN.

    Args:
        capacity: bytes that there are.
    """

    def __init__(self, capacity: int = 2**62) -> None:
        self.torch_device = torch.device("cpu")
        self.capacity = capacity
        self.records: list[Record] = []
        self.resident = 0  # bytes allocated now
        self.peak = 0  # most bytes allocated at a time
        self.pinned = 0  # bytes of host memory that were ever pinned
        self._lock = threading.RLock()
        self._queue: deque[tuple[_Point, torch.Tensor, torch.Tensor, str]] = deque()
        self._count = 0
        # By the address of buffers that may be copied to: what the first copy must wait for; then None.
        self._released: dict[int, _Point | None] = {}
        self._addresses: set[int] = set()
        self.names: dict[int, str] = {}  # of the blocks that are sent to buffers, by address

    def watch(self, loader: Loader) -> None:
        """Record a loader's copies under the names of their blocks."""
        send = loader.send

        def named(block, buffer, source):
            self.names[_address(buffer)] = block.name
            return send(block, buffer, source)

        loader.send = named

    def copied(self, what: str = "") -> int:
        """Return the bytes of all copies so far whose name starts so."""
        return sum(r.nbytes for r in self.records if r.kind == "copy" and r.what.startswith(what))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in this device's memory."""
        return _address(tensor) in self._addresses

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See Device."""
        if self.resident + nbytes > self.capacity:
            raise torch.OutOfMemoryError(f"{nbytes} bytes: {self.resident} of {self.capacity} are taken")

        def freed() -> None:
            with self._lock:
                self.resident -= nbytes
                self._addresses.discard(address)
                self.records.append(Record("free", "", nbytes))

        with self._lock:
            self.resident += nbytes
            self.peak = max(self.peak, self.resident)
            self.records.append(Record("allocate", "", nbytes))
        buffer = host_bytes(nbytes, freed)[:nbytes]
        self._addresses.add(address := _address(buffer))
        return buffer

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """See Device."""
        self.pinned += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def release(self, buffer: torch.Tensor) -> Mark:
        """See Device."""
        with self._lock:
            buffer.fill_(255)  # NaN in every floating-point dtype
            self.records.append(Record("release", "", buffer.nbytes))
            point = self._released[_address(buffer)] = self._next(buffer)
            return point

    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None) -> Mark:
        """See Device.

        Raises:
            RuntimeError: the buffer was not released since its last copy was waited for.
        """
        with self._lock:
            address = _address(buffer)
            what = self.names.get(address, "")
            if address not in self._released or self._released[address] != after:
                raise RuntimeError("a copy over memory that computation may still read")
            self._released[address] = None
            point = self._next(buffer)
            self._queue.append((point, buffer, source, what))
            self.records.append(Record("copy", what, source.nbytes))
            return point

    def wait(self, mark: Mark) -> None:
        """See Device."""
        with self._lock:
            self.finish(mark)
            self._released.pop(mark.address, None)

    def finish(self, mark: Mark) -> None:
        """See Device."""
        with self._lock:
            while self._queue and self._queue[0][0].number <= mark.number:
                _, buffer, source, what = self._queue.popleft()
                buffer.copy_(source)
                self.records.append(Record("arrive", what, source.nbytes))

    def _next(self, buffer: torch.Tensor) -> "_Point":
        self._count += 1
        return _Point(self._count, _address(buffer))

    def free_bytes(self) -> int:
        """See Device."""
        return self.capacity - self.resident

    def trim(self) -> None:
        """See Device."""


def _address(buffer: torch.Tensor) -> int:
    return buffer.untyped_storage().data_ptr()
