"""One model on the device: its weights are loaded, pass through buffers as blocks need them, and are dropped.

Hooks on the blocks, outside of their `forward`, bring each block's weights. They queue work and return; with
weights in pinned memory the host never waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...host_memory import FileMappings
from .devices import Device, Mark
from .layout import PackedBlock, PackedTensor, Placement, blocks_of, packed_blocks, streamed_blocks
from .transfer import Loader, Transfer


@dataclass
class BlockBuffer:
    """Memory on the device for one block."""

    memory: torch.Tensor
    transfer: Transfer | None = None  # transfer of the block in it, or on its way to it
    # Tensors in the memory, by the name of the block that was bound to it.
    views: dict[str, list[tuple[PackedTensor, torch.Tensor]]] = field(default_factory=dict)

    def bind(self, block: PackedBlock) -> None:
        """Make a block use this memory."""
        if block.name not in self.views:
            with torch.inference_mode(False):  # parameters may be used outside of it, too
                self.views[block.name] = [(tensor, tensor.view_in(self.memory)) for tensor in block.tensors]
        for tensor, view in self.views[block.name]:
            tensor.point_to(view)

    def queued(self) -> Mark:
        """Return the mark of the copy, once it is queued."""
        assert self.transfer is not None, "nothing was sent to this buffer"
        return self.transfer.mark()

    def drop(self, device: Device) -> None:
        """Wait for the copy, and release the memory."""
        if self.transfer is not None:
            self.transfer.drop(device)


class BlockBufferPool:
    """Buffers that blocks, of which there are more, pass through in the order of their calls.

    Positions count on from pass to pass, so that the first blocks of the next pass are on their way while the
    last ones of this pass compute.
    """

    def __init__(
        self, device: Device, loader: Loader, blocks: list[PackedBlock], placement: Placement
    ) -> None:
        self.device, self.loader, self.blocks, self.source = device, loader, blocks, placement.source
        size = max(block.nbytes for block in blocks)
        self.buffers = [BlockBuffer(device.allocate(size)) for _ in range(placement.buffers)]
        self._next = self._end = 0  # the next position to be called, and the first without a buffer
        self._current: PackedBlock | None = None

    def fill(self) -> None:
        """Start transfers to all free buffers."""
        while self._end - self._next < len(self.buffers):
            buffer = self._buffer(self._end)
            block = self.blocks[self._end % len(self.blocks)]
            buffer.transfer = self.loader.send(block, buffer.memory, self.source)
            self._end += 1

    def acquire(self, index: int) -> None:
        """Bind a block to its buffer before it is called; called again at once, it is still there."""
        if self._current is self.blocks[index]:
            return
        self.release()
        ahead = (index - self._next) % len(self.blocks)
        if ahead:  # a pass ended early, or skipped blocks
            for position in range(self._next, min(self._next + ahead, self._end)):
                self._buffer(position).queued()  # the transfer that replaces it must be queued behind it
            # In one statement: Ctrl-C may come at any time.
            self._next, self._end = self._next + ahead, max(self._end, self._next + ahead)
        self.fill()
        buffer = self._buffer(self._next)
        self.device.wait(buffer.queued())
        self._current = self.blocks[index]
        buffer.bind(self._current)

    def release(self) -> None:
        """Give the buffer of the block that was called last to the next block without one."""
        if self._current is not None:
            self._current.point_to_host()
            self._current = None
            self._next += 1
            self.fill()

    def drop(self) -> None:
        """Release all buffers."""
        for buffer in self.buffers:
            buffer.drop(self.device)
        self.buffers.clear()

    def _buffer(self, position: int) -> BlockBuffer:
        return self.buffers[position % len(self.buffers)]


class ModelStreamer:
    """Loads one model's weights from the CPU to the device and drops them again."""

    def __init__(
        self, name: str, model: nn.Module, placement: Placement, device: Device, loader: Loader
    ) -> None:
        self.name, self.model, self.placement = name, model, placement
        self.device, self.loader = device, loader
        self.on_device = False
        self._blocks: list[PackedBlock] = []
        self._resident: dict[int, BlockBuffer] = {}  # by block
        self._pending: set[int] = set()  # resident blocks that nothing has waited for
        self._index_in_pool: dict[int, int] = {}  # by block
        self._pool: BlockBufferPool | None = None
        self._handles: list[Any] = []
        self._scan()
        self._blocks = []  # scanned as a check; kept, they would keep weights that quantising replaces

    @property
    def streams(self) -> bool:
        """Whether blocks pass through buffers at each call."""
        return self._pool is not None

    @property
    def failed(self) -> bool:
        """Whether a copy to the device has failed, so that the model is to be loaded anew."""
        buffers = [*self._resident.values(), *(self._pool.buffers if self._pool else ())]
        return any(buffer.transfer is not None and buffer.transfer.failed for buffer in buffers)

    @property
    def host_weights(self) -> list[torch.Tensor]:
        """The weights on the host, as far as they have been loaded."""
        return [tensor.host for block in self._blocks for tensor in block.tensors]

    def attach(self) -> None:
        """Put hooks on the blocks."""
        for i, block in enumerate(blocks_of(self.model), start=1):
            self._handles.append(block.register_forward_pre_hook(self._hook(i)))

    def detach(self) -> None:
        """Remove the hooks; weights that were mapped before they were pinned are mapped again."""
        self.offload()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block in self._blocks:
            block.unpin()
        self._blocks = []

    def refresh(self) -> None:
        """Offload, take the weights on the host for the model's own, and forget those it no longer has."""
        self.offload()
        self._scan()
        self._blocks = [block for block in self._blocks if block.pinned is not None]
        for block in self._blocks:
            for tensor in block.tensors:
                tensor.mapped = None

    @torch.inference_mode(False)
    def load(self) -> None:
        """Start to copy the model to the device; after a torch.OutOfMemoryError all of it is on the host."""
        self._scan()
        self.on_device = True
        try:
            self._allocate()
            self._send()
        except BaseException:
            self.offload()
            raise

    def begin(self) -> None:
        """Wait for the weights outside of blocks; hooks wait for each block's."""
        if self._pool and torch.is_grad_enabled():
            trained = any(parameter.requires_grad for parameter in self.model.parameters())
            if trained:
                raise ValueError(f"{self.name} is streamed, without gradients; call it under torch.no_grad()")
        self._await(0)

    def end(self) -> None:
        """Let the buffer of the block that was called last go on to the next call's blocks."""
        if self._pool:
            self._pool.release()

    def offload(self) -> None:
        """Use the weights on the host, where they never changed, and release what is on the device."""
        if not self.on_device:  # weights on the host may have been edited
            return
        for block in self._blocks:
            block.point_to_host()
        if self._pool:
            self._pool.drop()
        for buffer in self._resident.values():
            buffer.drop(self.device)
        # A transfer that ended only now may have moved its block to pinned memory.
        for block in self._blocks:
            block.point_to_host()
        self._resident, self._pending, self._index_in_pool, self._pool = {}, set(), {}, None
        self.on_device = False

    def _scan(self) -> None:
        """Find the weights on the host, which may have been edited since they were last loaded."""
        blocks = packed_blocks(self.model, self.name, self.device.is_host)
        for tensor in (tensor for block in blocks for tensor in block.tensors):
            if tensor.host.device.type != "cpu":
                where = tensor.host.device
                raise ValueError(
                    f"{self.name} has weights on {where}; they must be on the CPU to be moved from: call "
                    "pipe.to('cpu') first"
                )
        known = {block.name: block for block in self._blocks}
        for i, block in enumerate(blocks):
            before = known.get(block.name)
            if before is not None and before.is_pinned_for(block):
                blocks[i] = before
        streamed_blocks(self.placement, len(blocks) - 1, self.name)
        files = FileMappings()
        for block in blocks:
            block.find_files(files)
        self._blocks = blocks

    def _allocate(self) -> None:
        streamed = [i + 1 for i in streamed_blocks(self.placement, len(self._blocks) - 1)]
        self._index_in_pool = {block: index for index, block in enumerate(streamed)}
        if streamed:
            blocks = [self._blocks[i] for i in streamed]
            self._pool = BlockBufferPool(self.device, self.loader, blocks, self.placement)
        for i, block in enumerate(self._blocks):
            if i not in self._index_in_pool and block.nbytes:
                self._resident[i] = BlockBuffer(self.device.allocate(block.nbytes))

    def _send(self) -> None:
        """Start all transfers, about in the order in which they are needed."""
        for i, buffer in self._resident.items():
            buffer.transfer = self.loader.send(self._blocks[i], buffer.memory, self.placement.source)
            self._pending.add(i)
            buffer.bind(self._blocks[i])
            if i == 0 and self._pool:
                self._pool.fill()
        if self._pool:
            self._pool.fill()

    def _await(self, index: int) -> None:
        if index in self._pending:
            self.device.wait(self._resident[index].queued())
            self._pending.remove(index)

    def _hook(self, index: int) -> Callable[..., None]:

        # Compiled along with a block, it would run only once, when it is traced.
        @torch.compiler.disable
        def before(block: nn.Module, args: Any) -> None:
            self._await(index)
            if self._pool and index in self._index_in_pool:
                self._pool.acquire(self._index_in_pool[index])
            elif self._pool:
                self._pool.release()

        return before
