"""The host's memory: what of it is free, and what is mapped from files."""

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def available_ram() -> float:
    """Return the bytes of host memory that this process can take, within limits of its control groups."""
    groups = Path("/proc/self/cgroup")
    limits = _left_in_groups(groups.read_text(), Path("/sys/fs/cgroup")) if groups.is_file() else ()
    return float(min((psutil.virtual_memory().available, *limits)))


def _left_in_groups(groups: str, root: Path) -> Iterator[int]:
    """Yield what is left of each memory limit of a process's control groups, such as a container's.

    `groups` is the text of /proc/self/cgroup, `root` the mount point.
    """
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            base, names, cached = root, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = "total_inactive_file"
        else:
            continue
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base) or not (folder / names[0]).is_file():
                continue
            limit, used = ((folder / name).read_text().strip() for name in names)
            stat = dict(pair.split() for pair in (folder / "memory.stat").read_text().splitlines())
            if limit.isdigit():  # "max" is none
                yield int(limit) - int(used) + int(stat.get(cached, 0))


class FileMappings:
    """This process's memory that is mapped from files; empty on systems other than Linux."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        if sys.platform == "linux":
            for line in Path("/proc/self/maps").read_text().splitlines():
                addresses, _, _, _, inode, *_ = line.split()
                if inode != "0":
                    first, last = (int(address, 16) for address in addresses.split("-"))
                    self.ranges.append((first, last))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        i = bisect_right(self.ranges, (address, sys.maxsize)) - 1
        return i >= 0 and address < self.ranges[i][1]


def trim_heap() -> None:
    """Give memory that was freed back to the system."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library, which has no such function
        return
    trim(0)
