"""Bringing slabs of weights from the host to the device, without letting the caller wait."""

import logging
import sys
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .devices import Device, Mark
from .layout import PackedBlock, Source

# Of the pinned buffer through which mapped weights pass: enough for copies to run at full speed.
CHUNK_BYTES, CHUNKS = 2**25, 4

logger = logging.getLogger(__name__)


class Transfer:
    """A slab on its way to the device.

    Args:
        group: what is in it.
        buffer: on the device.
        after: mark of what was computed with the buffer before.
    """

    def __init__(self, group: PackedBlock, buffer: torch.Tensor, after: Mark) -> None:
        self.group = group
        self.buffer: torch.Tensor | None = buffer
        self.after = after
        self.queued: Future[Mark] = Future()

    def mark(self) -> Mark:
        """Return the copy's mark, once it is queued."""
        return self.queued.result()

    def drop(self, device: Device) -> None:
        """Let go of the buffer, and of the slab, once nothing is copied between them any more."""
        if not self.queued.cancel() and self.queued.exception() is None:
            device.finish(self.mark())
        self.buffer = None


class Loader:
    """Copies slabs to a device: from pinned memory at once, from elsewhere by a thread.

    Where the system pins no more, the rest stays where it is and comes part by part.

    Args:
        device: to copy to.
        chunk_bytes: size of each part of the pinned buffer that mapped weights pass through.
    """

    def __init__(self, device: Device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.device = device
        self.chunk_bytes = chunk_bytes
        self._thread: ThreadPoolExecutor | None = None
        self._chunks: list[tuple[torch.Tensor, Mark]] = []  # oldest copy first
        self._pins = True  # whether the system has pinned all that was asked for

    def send(self, group: PackedBlock, buffer: torch.Tensor, source: Source) -> Transfer:
        """Start to fill a buffer.

        Args:
            group: what with; if its home is to be pinned and is not, it is from now on.
            buffer: bytes on the device, which nothing is computed with from now on.
            source: where the group is, or will be, at home.
        """
        delivery = Transfer(group, buffer, self.device.release(buffer))
        if group.slab is not None:
            delivery.queued.set_result(self._copy(delivery, group.slab))
            return delivery
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "wan22-weights")
        self._thread.submit(self._carry, delivery, source)
        return delivery

    def close(self) -> None:
        """Wait for the copies that were started, and give the thread and the buffer back."""
        if self._thread is not None:
            self._thread.shutdown()
        for _, mark in self._chunks:
            self.device.finish(mark)
        self._thread, self._chunks = None, []

    def _carry(self, delivery: Transfer, source: Source) -> None:
        """Carry out one delivery, in the thread."""
        if not delivery.queued.set_running_or_notify_cancel():
            return
        try:
            slab = self._pinned(delivery.group) if source == "pinned" else None
            mark = self._stage(delivery) if slab is None else self._copy(delivery, slab)
        except BaseException as error:
            delivery.queued.set_exception(error)
        else:
            delivery.queued.set_result(mark)

    def _copy(self, delivery: Transfer, slab: torch.Tensor) -> Mark:
        buffer, group = delivery.buffer, delivery.group
        assert buffer is not None, "a delivery is dropped after it was queued"
        return self.device.copy(buffer[: group.nbytes], slab, delivery.after, group.name)

    def _pinned(self, group: PackedBlock) -> torch.Tensor | None:
        """Give a group a home in pinned memory; where it was before is free again, if it was no file.

        Returns: it; None if the system does not pin so much.
        """
        if group.slab is not None:  # an earlier delivery, given up since, had it done
            return group.slab
        slab = self._allocate_host(group.nbytes) if self._pins else None
        if slab is None:
            return None
        group.read(slab, 0)
        mapped = FileMappings()
        for piece in group.pieces:
            piece.mapped = piece.host if piece.host in mapped else None
            piece.host = piece.view_in(slab)
        group.slab = slab
        return slab

    def _stage(self, delivery: Transfer) -> Mark:
        """Copy a group part by part."""
        buffer, group, mark = delivery.buffer, delivery.group, None
        assert buffer is not None, "a delivery is dropped after it was queued"
        for start in range(0, group.nbytes, self.chunk_bytes):
            chunk = self._free_chunk()
            source = chunk[: group.nbytes - start]
            group.read(source, start)
            part, after = buffer[start : start + source.nbytes], None if start else delivery.after
            mark = self.device.copy(part, source, after, group.name)
            self._chunks.append((chunk, mark))
        return mark

    def _free_chunk(self) -> torch.Tensor:
        """Return a part of the pinned buffer that no copy reads any more."""
        if len(self._chunks) < CHUNKS:
            chunk = self._allocate_host(self.chunk_bytes)
            # Copies from memory that is not pinned are as right, but make the thread wait.
            return torch.empty(self.chunk_bytes, dtype=torch.uint8) if chunk is None else chunk
        chunk, mark = self._chunks.pop(0)
        self.device.finish(mark)
        return chunk

    def _allocate_host(self, nbytes: int) -> torch.Tensor | None:
        """Return pinned memory; None, with a warning the first time, if the system does not pin so much."""
        try:
            return self.device.allocate_host(nbytes)
        except MemoryError as error:
            if self._pins:
                logger.warning("%s; copies are slower now; planning with a smaller ram= avoids it", error)
            self._pins = False
            return None


class FileMappings:
    """The parts of this process's memory that are files; none are known where the system does not tell."""

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
