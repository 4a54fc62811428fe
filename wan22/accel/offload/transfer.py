"""Transfers of packed blocks from the host to the device, which the caller need not wait for."""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ...checkpoints.deferred import DeferredWeight
from ...checks import cut
from ...host_memory import FileMappings
from .devices import Device, Mark
from .layout import PackedBlock, Source

# The pinned staging buffer of mapped weights: large enough for copies to run at full speed.
CHUNK_BYTES, CHUNKS = 2**25, 4

logger = logging.getLogger(__name__)


class Transfer:
    """A packed block on its way to a buffer, after the mark of the buffer's last use in a computation."""

    def __init__(self, block: PackedBlock, buffer: torch.Tensor, after: Mark) -> None:
        self.block = block
        self.buffer: torch.Tensor | None = buffer
        self.after = after
        self.queued: Future[Mark] = Future()

    def mark(self) -> Mark:
        """Return the copy's mark, once it is queued; a RuntimeError names the weights of one that failed."""
        try:
            return self.queued.result()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = cut(next(iter(str(error).splitlines()), ""))
            raise RuntimeError(f"the weights {self.block.name} could not be copied: {first}") from error

    @property
    def failed(self) -> bool:
        """Whether the copy could not be queued."""
        done = self.queued.done() and not self.queued.cancelled()
        return done and self.queued.exception() is not None

    def drop(self, device: Device) -> None:
        """Release the buffer and the host's memory, once nothing is copied between them."""
        if not self.queued.cancel() and self.queued.exception() is None:
            device.finish(self.mark())
        self.buffer = None


class Loader:
    """Copies packed blocks to a device: from pinned memory at once, from elsewhere in a thread.

    If the system refuses to pin more memory, blocks are staged through a small buffer instead.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.chunk_bytes = CHUNK_BYTES
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: ThreadPoolExecutor | None = None  # reads the next block's file while one is copied
        self._waiting: deque[PackedBlock] = deque()
        self._chunks: list[tuple[torch.Tensor, Mark]] = []  # oldest copy first
        self._pins = True  # False once the system has refused to pin

    def send(self, block: PackedBlock, buffer: torch.Tensor, source: Source) -> Transfer:
        """Start to fill a buffer that no later computation reads; source "pinned" pins the block first."""
        transfer = Transfer(block, buffer, self.device.release(buffer))
        if block.pinned is not None:
            transfer.queued.set_result(self._copy(transfer, block.pinned))
            return transfer
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "wan22-weights", self.device.use_in_thread)
        self._waiting.append(block)
        self._thread.submit(self._run, transfer, source)
        return transfer

    def close(self) -> None:
        """Wait for the copies that were started, and release the thread and the staging buffer."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._ahead is not None:
            self._ahead.shutdown()
        for _, mark in self._chunks:
            self.device.finish(mark)
        self._thread, self._ahead, self._chunks = None, None, []

    def _run(self, transfer: Transfer, source: Source) -> None:
        self._waiting.popleft()
        if self._waiting and self._waiting[0].files:
            self._ahead = self._ahead or ThreadPoolExecutor(1, "wan22-files")
            self._ahead.submit(self._waiting[0].read_ahead)
        if not transfer.queued.set_running_or_notify_cancel():
            return
        try:
            pinned = self._pin(transfer.block) if source == "pinned" else None
            mark = self._stage(transfer) if pinned is None else self._copy(transfer, pinned)
        except BaseException as error:
            transfer.queued.set_exception(error)
        else:
            transfer.queued.set_result(mark)

    def _copy(self, transfer: Transfer, pinned: torch.Tensor) -> Mark:
        buffer, block = transfer.buffer, transfer.block
        assert buffer is not None, "a transfer is dropped after it was queued"
        return self.device.copy(buffer[: block.nbytes], pinned, transfer.after)

    def _pin(self, block: PackedBlock) -> torch.Tensor | None:
        """Move a block to pinned memory and return that; None if the system does not pin so much."""
        if block.pinned is not None:  # by an earlier transfer that was dropped since
            return block.pinned
        pinned = self._allocate_host(block.nbytes) if self._pins else None
        if pinned is None:
            return None
        block.read(pinned, 0)
        files = FileMappings()
        for tensor in block.tensors:
            keeps = isinstance(tensor.host, DeferredWeight) or tensor.host in files
            tensor.mapped = tensor.host if keeps else None
            tensor.host = tensor.view_in(pinned)
        block.pinned = pinned
        return pinned

    def _stage(self, transfer: Transfer) -> Mark:
        buffer, block, mark = transfer.buffer, transfer.block, None
        assert buffer is not None, "a transfer is dropped after it was queued"
        if self.device.is_host:
            block.read(buffer[: block.nbytes], 0)
            return mark
        try:
            for start in range(0, block.nbytes, self.chunk_bytes):
                chunk = self._free_chunk()
                source = chunk[: block.nbytes - start]
                block.read(source, start)
                part, after = buffer[start : start + source.nbytes], None if start else transfer.after
                mark = self.device.copy(part, source, after)
                self._chunks.append((chunk, mark))
        except BaseException:
            if mark is not None:
                self.device.finish(mark)  # whoever hears of the failure gives the buffer away
            raise
        return mark

    def _free_chunk(self) -> torch.Tensor:
        """Return a part of the staging buffer that no copy reads any more."""
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
