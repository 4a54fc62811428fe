"""Devices that models run on, and the copies of weights to them.

Weights do not change while a model runs, so they are only copied from the host to the device, never back.
Copies have a stream of their own and run beside computation. Marks order the two: `release` marks the
computation after which memory may be overwritten, `wait` makes the next computation wait for a copy.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ...devices import card, free_and_total, has_own_memory, module_of
from ...host_memory import available_ram, fault_in, trim_heap

# A point in the order of computations or copies; each device has its own type.
Mark = Any
_PAGE = 4096


class Device(ABC):
    """A device that models run on."""

    torch_device: torch.device
    is_host = False  # whether its memory is the host's, which weights are read into without a copy between

    def use_in_thread(self) -> None:
        """Make this the device of a thread that queues copies: each thread begins with the first one."""
        if has_own_memory(self.torch_device):
            module_of(self.torch_device).set_device(self.torch_device)

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return bytes on the device, freed with the last tensor on them; or torch.OutOfMemoryError."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """Return host memory that copies can run from in the background; or MemoryError."""

    @abstractmethod
    def release(self, buffer: torch.Tensor) -> Mark:
        """Return a mark of all computation so far, which a copy into a buffer has to wait for."""

    @abstractmethod
    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None) -> Mark:
        """Queue a copy behind all earlier ones, and return its mark.

        The source, from `allocate_host`, must stay as it is until the copy is over. `after` is the mark that
        `release` returned for the buffer; None: an earlier copy waited for it.
        """

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """Make later computation wait for a copy; the host does not wait."""

    @abstractmethod
    def finish(self, mark: Mark) -> None:
        """Make the host wait for a copy."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return how many bytes are free."""

    @abstractmethod
    def trim(self) -> None:
        """Give cached memory back, so that it can be allocated in larger pieces."""


class CudaDevice(Device):
    """A CUDA device, or another one with streams and memory of its own; ValueError if there is none.

    Args:
        device: the device; None: the one that there is.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        found = card()
        if found is None:
            named = torch.device(device or "cuda")
            raise ValueError(f"there is no CUDA device here, and {named} is one; plan with device='cpu'")
        device = torch.device(device or found)
        self._module = module_of(device)
        index = self._module.current_device() if device.index is None else device.index
        self.torch_device = torch.device(device.type, index)
        self._copies = self._module.Stream(self.torch_device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See Device; the memory belongs to the computing stream, which uses it for activations, too."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """See Device; the memory is pinned."""
        if self.torch_device.type != "cuda":
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as refused:
                raise MemoryError(f"the system does not pin {nbytes / 2**20:.0f} MiB: {refused}") from refused
        # PyTorch's own pinned memory comes in powers of two, half as much again for a block of 14B, and never
        # goes back to the system.
        cudart, address = torch.cuda.cudart(), 0

        def freed() -> None:
            if address:
                cudart.cudaHostUnregister(address)

        buffer = host_bytes(nbytes, freed)
        fault_in(buffer)
        with torch.cuda.device(self.torch_device):
            error = cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1)  # 1: for all devices
        if int(error):
            with suppress(RuntimeError):  # PyTorch raises the error again at the next kernel
                torch.zeros(1, device=self.torch_device).add_(1)
            raise MemoryError(f"the system does not pin {nbytes / 2**20:.0f} MiB of host memory ({error})")
        address = buffer.data_ptr()
        return buffer[:nbytes]

    def release(self, buffer: torch.Tensor) -> Mark:
        """See Device."""
        return self._module.current_stream(self.torch_device).record_event()

    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None) -> Mark:
        """See Device."""
        with self._module.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            buffer.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, mark: Mark) -> None:
        """See Device."""
        self._module.current_stream(self.torch_device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """See Device."""
        mark.synchronize()

    def free_bytes(self) -> int:
        """See Device."""
        return free_and_total(self.torch_device)[0]

    def trim(self) -> None:
        """See Device."""
        self._module.empty_cache()


class HostDevice(Device):
    """The CPU: weights pass through scratch memory, where they lie as its kernels want them.

    It computes when it is called, so that nothing has to be marked or waited for.
    """

    is_host = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See Device."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(f"the host has no {nbytes / 1e9:.2f} GB left") from error

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """See Device."""
        return self.allocate(nbytes)

    def release(self, buffer: torch.Tensor) -> Mark:
        """See Device."""

    def copy(self, buffer: torch.Tensor, source: torch.Tensor, after: Mark | None) -> Mark:
        """See Device."""
        buffer.copy_(source)

    def wait(self, mark: Mark) -> None:
        """See Device."""

    def finish(self, mark: Mark) -> None:
        """See Device."""

    def free_bytes(self) -> int:
        """See Device."""
        return int(available_ram())

    def trim(self) -> None:
        """See Device."""
        trim_heap()


def host_bytes(nbytes: int, freed: Callable[[], None]) -> torch.Tensor:
    """Return whole pages of host memory; `freed` is called when the last tensor on them is gone."""
    nbytes = -(-nbytes // _PAGE) * _PAGE
    memory = np.empty(nbytes + _PAGE, np.uint8)
    weakref.finalize(memory, freed).atexit = False  # the driver may be gone by then
    start = -memory.ctypes.data % _PAGE
    # A view of the array: the tensor's storage starts where the pages do.
    return torch.from_numpy(memory[start : start + nbytes])
