"""Where models run, and how their weights get there.

Weights never change while a model runs, so they only ever go one way, from the host to the device; there is
no operation that copies them back. Copies have a stream of their own and run while the device computes. What
orders the two are marks: `release` says after which computation memory may be overwritten, `wait` which copy
the next computation needs.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

# A point in the order of computations or copies: what a device makes of it is its own affair.
Mark = Any
_PAGE = 4096


class Device(ABC):
    """A place where models run."""

    torch_device: torch.device

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return bytes on the device; they are free again when the last tensor on them is gone.

        Raises:
            torch.OutOfMemoryError: there are not so many.
        """

    @abstractmethod
    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """Return bytes of the host that copies can run from in the background."""

    @abstractmethod
    def release(self, buffer: torch.Tensor) -> Mark:
        """Return a mark for a copy into a buffer to wait for: of all computation up to now."""

    @abstractmethod
    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None, what: str) -> Mark:
        """Queue a copy, behind all earlier ones.

        Args:
            buffer: bytes on the device.
            source: as many bytes of `allocate_host`, which must keep them until the copy is over.
            after: what `release` returned for the buffer; None: the copy before this one waited for it.
            what: a name for records.

        Returns: a mark of the copy.
        """

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """Let what is computed from now on wait for a copy; the host does not wait."""

    @abstractmethod
    def finish(self, mark: Mark) -> None:
        """Let the host wait for a copy."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return how many bytes could be allocated without any being taken from what runs."""

    @abstractmethod
    def trim(self) -> None:
        """Give memory that is free back, so that pieces of it can be allocated as a whole."""


class CudaDevice(Device):
    """A CUDA device.

    Args:
        device: such as "cuda" or "cuda:1".

    Raises:
        ValueError: there is none.
    """

    def __init__(self, device: str | torch.device = "cuda") -> None:
        device = torch.device(device)
        if not torch.cuda.is_available():
            raise ValueError(f"there is no CUDA device here, and {device} is one; plan with device='cpu'")
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self._copies = torch.cuda.Stream(self.torch_device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See Device.

        The memory belongs to the stream that computes, so that it serves activations before and after.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """See Device.

        PyTorch's own pinned memory comes in powers of two, which would be half as much again for a block of
        14B, and never goes back to the system.

        Raises:
            MemoryError: the system does not pin so many.
        """
        cudart, address = torch.cuda.cudart(), 0

        def freed() -> None:
            if address:
                cudart.cudaHostUnregister(address)

        buffer = host_bytes(nbytes, freed)
        with torch.cuda.device(self.torch_device):
            error = cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1)  # 1: for all devices
        if int(error):
            with suppress(RuntimeError):  # PyTorch raises it once more, at the next kernel whichever that is
                torch.zeros(1, device=self.torch_device).add_(1)
            raise MemoryError(f"the system does not pin {nbytes / 2**20:.0f} MiB of host memory ({error})")
        address = buffer.data_ptr()
        return buffer[:nbytes]

    def release(self, buffer: torch.Tensor) -> Mark:
        """See Device."""
        return torch.cuda.current_stream(self.torch_device).record_event()

    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None, what: str) -> Mark:
        """See Device."""
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            buffer.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, mark: Mark) -> None:
        """See Device."""
        torch.cuda.current_stream(self.torch_device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """See Device."""
        mark.synchronize()

    def free_bytes(self) -> int:
        """See Device."""
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def trim(self) -> None:
        """See Device."""
        torch.cuda.empty_cache()


def host_bytes(nbytes: int, freed: Callable[[], None]) -> torch.Tensor:
    """Return whole pages of host memory; `freed` is called when the last tensor on them is gone."""
    nbytes = -(-nbytes // _PAGE) * _PAGE
    memory = np.empty(nbytes + _PAGE, np.uint8)
    weakref.finalize(memory, freed).atexit = False  # the driver may be gone by then
    start = -memory.ctypes.data % _PAGE
    # A view of the array, so that the tensor's storage starts where the pages do.
    return torch.from_numpy(memory[start : start + nbytes])
