"""A machine's memory, and its rates of products and copies, which are measured once."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ... import devices
from ...checks import parse_bytes, shown
from ...host_memory import MARGIN, available_ram
from ..offload.devices import CudaDevice

GB = 1e9
# GPU memory of a process before its first tensor: context and kernels, which PyTorch does not count.
CONTEXT = 600e6


@dataclass(frozen=True)
class Machine:
    """Memory and rates that a plan is made for; a rate of None is unknown."""

    device: torch.device  # the transformers' device
    vram: float  # device bytes for tensors; on a CPU, host bytes
    ram: float  # host bytes
    flops: float | None = None  # operations a second of matrix products in bfloat16
    bandwidth: float | None = None  # bytes a second from host to device
    disk: float | None = None  # bytes a second from files
    pinning: float | None = None  # bytes a second of host memory that is pinned

    @classmethod
    def of(
        cls,
        vram: Any = None,
        ram: Any = None,
        disk: Any = None,
        device: Any = None,
        taken: Mapping[str, int] | None = None,
    ) -> "Machine":
        """Return this machine within a budget; the arguments but the last are those of `plan`.

        `taken` has bytes, by type of device, that the plan is to place anew: they count as free. Unreadable
        amounts, vram for a CPU, and a missing CUDA device are refused.
        """
        found = devices.card()
        device = torch.device(device or found or ("cpu" if vram is None else "cuda"))
        here = found is not None and found.type == device.type
        if device.type == "cpu" and vram is not None:
            raise ValueError(
                f"vram={shown(vram)} is a GPU's, and device='cpu' has none; give ram={shown(vram)}"
            )
        taken = taken or {}
        free = (1 - MARGIN) * (available_ram() + taken.get("cpu", 0))
        host = free if ram is None else parse_bytes(ram, "ram")
        speed = None if disk is None else parse_bytes(disk, "disk")
        if device.type == "cpu":
            return cls(device, host, host, measured_flops("cpu"), None, speed)
        if vram is None:
            if not here:
                raise ValueError("there is no CUDA device here; give vram, such as '12GB', to plan for one")
            # PyTorch's reserve that no tensor takes is free, too.
            module = devices.module_of(device)
            spare = module.memory_reserved(device) - module.memory_allocated(device)
            room = float(devices.free_and_total(device)[0] + spare + taken.get(device.type, 0))
        else:
            room = parse_bytes(vram, "vram") - CONTEXT
        flops, bandwidth, pinning = None, None, None
        if here:
            flops, bandwidth = measured_flops(str(device)), measured_bandwidth(str(device))
            pinning = measured_pinning(str(device))
            devices.module_of(device).empty_cache()  # the memory that measuring took
        return cls(device, room, host, flops, bandwidth, speed, pinning)

    @property
    def has_device(self) -> bool:
        """Whether the device is not the host."""
        return self.device.type != "cpu"

    def __str__(self) -> str:
        device = f"{self.vram / GB:.2f} GB of {self.device.type} memory and " if self.has_device else ""
        return f"{device}{self.ram / GB:.2f} GB of host memory"


@cache
def measured_flops(device: str) -> float:
    """Return the operations a second of a large linear layer in bfloat16.

    Where a CPU has no instructions for it, a product of other strides takes twenty times as long.
    """
    size, rounds = (8192, 10) if device != "cpu" else (1024, 3)
    x = torch.randn(size, size, device=device).to(torch.bfloat16)
    return 2.0 * size**3 / _best_seconds(lambda: F.linear(x, x), rounds, device)


@cache
def measured_bandwidth(device: str) -> float | None:
    """Return the bytes a second of copies from pinned memory; None if the system does not pin."""
    card = CudaDevice(device)
    try:
        source = card.allocate_host(2**28)  # not PyTorch's own, which never goes back to the system
    except MemoryError:
        return None
    target = card.allocate(source.nbytes)
    return source.nbytes / _best_seconds(lambda: target.copy_(source, non_blocking=True), 5, device)


@cache
def measured_pinning(device: str) -> float | None:
    """Return the bytes a second of host memory that are pinned; None if the system does not pin."""
    card, start = CudaDevice(device), time.perf_counter()
    try:
        return card.allocate_host(2**28).nbytes / (time.perf_counter() - start)
    except MemoryError:
        return None


def _best_seconds(function: Any, rounds: int, device: str) -> float:
    """Return the seconds of the fastest round, the first one aside."""
    best = float("inf")
    for i in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.accelerator.synchronize(torch.device(device))
        if i:
            best = min(best, time.perf_counter() - start)
    return best
