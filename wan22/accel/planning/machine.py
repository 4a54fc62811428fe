"""What a machine has: memory, and how fast it multiplies and copies, measured once."""

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch

GB = 1e9
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# What a process takes of a card before its first tensor: context and kernels; PyTorch does not count it.
CONTEXT = 600e6


@dataclass(frozen=True)
class Machine:
    """Memory and rates that a plan is made for.

    Args:
        device: where transformers run.
        vram: bytes that tensors may take on the device; on a CPU, of the host.
        ram: bytes that may be taken of the host.
        flops: of matrix products in bfloat16, a second; None: not known.
        bandwidth: bytes a second from host to device; None: not known.
        disk: bytes a second from files; None: not known.
    """

    device: torch.device
    vram: float
    ram: float
    flops: float | None = None
    bandwidth: float | None = None
    disk: float | None = None

    @classmethod
    def of(cls, vram: Any = None, ram: Any = None, disk: Any = None, device: Any = None) -> "Machine":
        """Take a budget, and the rest from this machine.

        Args:
            vram: memory of the device, as `parse_bytes` takes it; the context's share is taken off.
            ram: memory of the host.
            disk: a second from files.
            device: default is "cuda" if there is one or vram is given, or else "cpu".
        """
        here = torch.cuda.is_available()
        device = torch.device(device or ("cuda" if here or vram is not None else "cpu"))
        host = float(psutil.virtual_memory().available) if ram is None else parse_bytes(ram)
        speed = None if disk is None else parse_bytes(disk)
        if device.type == "cpu":
            return cls(device, host, host, measured_flops("cpu"), None, speed)
        if vram is None:
            if not here:
                raise ValueError("there is no CUDA device here; give vram, such as '12GB', to plan for one")
            room = float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device))
        else:
            room = parse_bytes(vram) - CONTEXT
        flops, bandwidth = (
            (measured_flops(str(device)), measured_bandwidth(str(device))) if here else (None,) * 2
        )
        return cls(device, room, host, flops, bandwidth, speed)

    @property
    def has_device(self) -> bool:
        """Whether there is a device beside the host."""
        return self.device.type != "cpu"

    def __str__(self) -> str:
        device = f"{self.vram / GB:.2f} GB of {self.device.type} memory and " if self.has_device else ""
        return f"{device}{self.ram / GB:.2f} GB of host memory"


def parse_bytes(amount: str | float) -> float:
    """Return bytes: "12GB" is 12e9 of them, "12GiB" 12 * 2**30; a number is one.

    Raises:
        ValueError: it is no amount, or none above 0.
    """
    text = str(amount).strip().upper()
    match = re.fullmatch(r"([0-9.]+(?:E[0-9+]+)?)\s*([KMGT]?I?B?)(?:/S)?", text)
    unit = match.group(2) if match else "?"
    unit += "" if unit.endswith("B") or not unit else "B"
    try:
        value = float(match.group(1)) * _UNITS[unit] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if value <= 0:
        raise ValueError(
            f"{amount!r} is no amount of memory; write it as '12GB', '11.5GiB' or a number of bytes"
        )
    return value


@cache
def measured_flops(device: str) -> float:
    """Return the floating-point operations a second of a large matrix product in bfloat16."""
    size, rounds = (8192, 10) if device != "cpu" else (1024, 3)
    x = torch.randn(size, size, device=device).to(torch.bfloat16)
    return 2.0 * size**3 / _best_seconds(lambda: x @ x, rounds, device)


@cache
def measured_bandwidth(device: str) -> float:
    """Return the bytes a second of copies from pinned memory."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.nbytes / _best_seconds(lambda: target.copy_(source, non_blocking=True), 5, device)


def _best_seconds(function: Any, rounds: int, device: str) -> float:
    """Return the seconds of the fastest of some rounds, after one that does not count."""
    best = float("inf")
    for i in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best
