"""The host's memory: what of it is free, and what is mapped from files."""

import ctypes
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

# Threads that find memory for pages: more get into each other's way in the system. Pages worth a thread.
_THREADS, _PAGES = 8, 4096
# Share of the free host memory that is left to other programs, unless an amount is given.
MARGIN = 0.1


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


@dataclass(frozen=True)
class MappedFile:
    """A file, or a part of one, in this process's memory."""

    first: int  # address
    last: int  # the address behind it
    path: str
    offset: int  # in the file

    def check(self) -> None:
        """Raise OSError if the file has become shorter than the part that is mapped.

        Reading what is missing would end the process. A file that was deleted is read as before.
        """
        try:
            size = os.stat(self.path).st_size
        except OSError:
            return
        needed = self.offset + self.last - self.first
        if size <= needed - mmap.PAGESIZE:
            raise OSError(
                f"{self.path} was cut off while its weights were in use: it has {size} bytes, and had about "
                f"{needed}; load the weights anew"
            )


class FileMappings:
    """This process's memory that is mapped from files; empty on systems other than Linux."""

    def __init__(self) -> None:
        self.files: list[MappedFile] = []
        if sys.platform == "linux":
            for line in Path("/proc/self/maps").read_text().splitlines():
                addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
                if inode != "0":
                    first, last = (int(address, 16) for address in addresses.split("-"))
                    self.files.append(MappedFile(first, last, "".join(path), int(offset, 16)))

    def find(self, tensor: torch.Tensor) -> MappedFile | None:
        """Return the file that a tensor begins in; None: it is in none."""
        address = tensor.data_ptr()
        i = bisect_right(self.files, address, key=lambda file: file.first) - 1
        return self.files[i] if i >= 0 and address < self.files[i].last else None

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return self.find(tensor) is not None


def anonymous_bytes(tensors: Iterable[torch.Tensor], files: FileMappings | None = None) -> int:
    """Return the bytes of ordinary tensors on the host that are in no file; tied ones count once."""
    files = FileMappings() if files is None else files
    plain = [t for t in tensors if t.device.type == "cpu" and type(t) in (nn.Parameter, torch.Tensor)]
    each = {tensor.data_ptr(): tensor for tensor in plain if tensor not in files}
    return sum(tensor.nbytes for tensor in each.values())


def check_room(nbytes: float, what: str, instead: str) -> None:
    """Refuse, with a MemoryError, what takes more of the host's memory than there is room for.

    Args:
        nbytes: bytes that it takes for good.
        what: what is done, such as "quantizing".
        instead: what to do instead.
    """
    room = (1 - MARGIN) * available_ram()
    if nbytes > room:
        taken = f"{what} takes {nbytes / 1e9:.2f} GB of the host's memory"
        raise MemoryError(f"{taken}, and there is room for {room / 1e9:.2f} GB; {instead}")


def read_ahead(tensor: torch.Tensor) -> None:
    """Ask the system to read a tensor's part of a file before it is used, which doubles the rate and more."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    if sys.platform == "linux" and tensor.nbytes:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def fault_in(buffer: torch.Tensor) -> None:
    """Let the system find memory for all pages of a tensor of bytes, by several threads.

    Pinning finds it, too, page by page in one thread, which takes most of its time. Bytes become undefined.
    """
    pages = buffer.numpy()[:: mmap.PAGESIZE]
    threads = min(_THREADS, os.cpu_count() or 1, -(-pages.size // _PAGES))
    if threads <= 1:
        return  # what follows finds it as fast
    with ThreadPoolExecutor(threads, "wan22-pages") as pool:
        for part in np.array_split(pages, threads):
            pool.submit(part.fill, 0)


def trim_heap() -> None:
    """Give memory that was freed back to the system."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library, which has no such function
        return
    trim(0)
