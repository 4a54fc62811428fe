"""One model's stay on the device: how its weights arrive, pass through buffers as they are needed, and leave.

Hooks on the blocks, outside of their `forward`, let each have its weights when it is called. They queue work
and return; with weights in pinned memory the host never waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .devices import Device
from .layout import (
    PackedBlock,
    PackedTensor,
    Placement,
    blocks_of,
    device_bytes,
    packed_blocks,
    streamed_blocks,
)
from .transfer import Loader, Transfer


@dataclass
class BlockBuffer:
    """Room for one block.

    Args:
        buffer: on the device.
        delivery: what is in it, or on its way.
        views: of the pieces of each group that was here, in it.
    """

    buffer: torch.Tensor
    delivery: Transfer | None = None
    views: dict[str, list[tuple[PackedTensor, torch.Tensor]]] = field(default_factory=dict)

    def bind(self, group: PackedBlock) -> None:
        """Let a group's owners have their values here."""
        if group.name not in self.views:
            with torch.inference_mode(False):  # parameters may be used outside of it, too
                self.views[group.name] = [(piece, piece.view_in(self.buffer)) for piece in group.pieces]
        for piece, view in self.views[group.name]:
            piece.point_to(view)


class BlockBufferPool:
    """Slots through which blocks pass in the order in which they are called, over and over.

    Turns are counted on from pass to pass, so that the first blocks of the next pass are on their way while
    the last ones of this one compute.

    Args:
        device: of the buffers.
        loader: fills them.
        groups: of the blocks, more than there are buffers.
        placement: says how many buffers, and where the groups are at home.
    """

    def __init__(
        self, device: Device, loader: Loader, groups: list[PackedBlock], placement: Placement
    ) -> None:
        self.device, self.loader, self.groups, self.source = device, loader, groups, placement.source
        size = max(group.nbytes for group in groups)
        self.buffers = [BlockBuffer(device.allocate(size)) for _ in range(placement.buffers)]
        self._next = self._end = 0  # the turn that is next to be taken, and the first that has no slot yet
        self._inside: PackedBlock | None = None

    def fill(self) -> None:
        """Start deliveries to all buffers that are free."""
        while self._end - self._next < len(self.buffers):
            slot = self._slot(self._end)
            group = self.groups[self._end % len(self.groups)]
            slot.delivery = self.loader.send(group, slot.buffer, self.source)
            self._end += 1

    def enter(self, index: int) -> None:
        """Let the block of a group have its weights."""
        if self._inside is not None:  # an exception came out of a block
            self.leave()
        count = len(self.groups)
        ahead = (index - self._next) % count
        if ahead:  # a pass ended early, or left blocks out
            for turn in range(self._next, min(self._next + ahead, self._end)):
                delivery = self._slot(turn).delivery
                assert delivery is not None, "turns up to the end have one"
                delivery.mark()  # what replaces it must be queued behind it
            # At once, whenever Ctrl-C comes.
            self._next, self._end = self._next + ahead, max(self._end, self._next + ahead)
        self.fill()
        slot = self._slot(self._next)
        assert slot.delivery is not None, "the buffers are full"
        self.device.wait(slot.delivery.mark())
        self._inside = self.groups[index]
        slot.bind(self._inside)

    def leave(self) -> None:
        """Let the block that had its turn go home; the next one without a slot gets its slot."""
        if self._inside is not None:
            self._inside.point_to_host()
            self._inside = None
            self._next += 1
            self.fill()

    def drop(self) -> None:
        """Let go of all buffers."""
        for slot in self.buffers:
            if slot.delivery is not None:
                slot.delivery.drop(self.device)
        self.buffers.clear()

    def _slot(self, turn: int) -> BlockBuffer:
        return self.buffers[turn % len(self.buffers)]


class ModelStreamer:
    """Lets one model come and go.

    Args:
        name: of the model.
        model: all of it on the host.
        placement: anything but "host".
        device: where it stays.
        loader: of that device.

    Raises:
        ValueError: the model cannot be placed so.
    """

    def __init__(
        self, name: str, model: nn.Module, placement: Placement, device: Device, loader: Loader
    ) -> None:
        self.name, self.model, self.placement = name, model, placement
        self.device, self.loader = device, loader
        self.on_device = False
        self._groups: list[PackedBlock] = []
        self._buffers: list[torch.Tensor] = []
        self._deliveries: list[Transfer] = []
        self._expected: dict[int, Transfer] = {}  # by group, those that nothing has waited for
        self._turns: dict[int, int] = {}  # by group, its place among those of the ring
        self._ring: BlockBufferPool | None = None
        self._handles: list[Any] = []
        self._scan()
        self._groups = []  # that was to check them; kept, they would outlive their quantisation

    @property
    def streams(self) -> bool:
        """Whether blocks pass through buffers at each call."""
        return self._ring is not None

    @property
    def nbytes(self) -> int:
        """What the stay takes on the device."""
        return device_bytes(self.model, self.placement)

    @property
    def host_weights(self) -> list[torch.Tensor]:
        """The weights on the host, as far as they are known."""
        return [piece.host for group in self._groups for piece in group.pieces]

    def install(self) -> None:
        """Put hooks on the blocks."""
        for i, block in enumerate(blocks_of(self.model), start=1):
            before, after = self._hooks(i)
            self._handles.append(block.register_forward_pre_hook(before))
            self._handles.append(block.register_forward_hook(after))

    def remove(self) -> None:
        """Take the hooks away, and let the weights be again where they were, if that still holds them."""
        self.leave()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for group in self._groups:
            group.unpin()
        self._groups = []

    def offload_all(self) -> None:
        """Leave, count what is at home now as the weights, and hold none that the model no longer has."""
        self.leave()
        self._scan()
        self._groups = [group for group in self._groups if group.slab is not None]
        for group in self._groups:
            for piece in group.pieces:
                piece.mapped = None

    @torch.inference_mode(False)
    def arrive(self) -> None:
        """Start to bring the model to the device.

        Raises:
            torch.OutOfMemoryError: it does not fit; it is at home then.
        """
        self._scan()
        self.on_device = True
        try:
            self._allocate()
            self._send()
        except BaseException:
            self.leave()
            raise

    def begin(self) -> None:
        """Let the model have the weights that are not in blocks: those are for the hooks.

        Raises:
            ValueError: gradients would be needed of weights that pass through buffers.
        """
        if self._ring and torch.is_grad_enabled():
            trained = any(parameter.requires_grad for parameter in self.model.parameters())
            if trained:
                raise ValueError(f"{self.name} is streamed, without gradients; call it under torch.no_grad()")
        self._await(0)

    def leave(self) -> None:
        """Let the weights be at home, which they never left, and drop what is on the device."""
        if not self.on_device:  # what is at home may have been edited
            return
        for group in self._groups:
            group.point_to_host()
        if self._ring:
            self._ring.drop()
        for delivery in self._deliveries:
            delivery.drop(self.device)
        # The packing of a group may have ended only now, and its home is another since.
        for group in self._groups:
            group.point_to_host()
        self._deliveries, self._buffers, self._ring = [], [], None
        self._expected, self._turns = {}, {}
        self.on_device = False

    def _scan(self) -> None:
        """Find the weights where they are at home now: they may have been edited since the last stay."""
        groups = packed_blocks(self.model, self.name)
        for piece in (piece for group in groups for piece in group.pieces):
            if piece.host.device.type != "cpu":
                where = piece.host.device
                raise ValueError(
                    f"{self.name} has weights on {where}; they must be on the CPU to be moved from: call "
                    "pipe.to('cpu') first"
                )
        known = {group.name: group for group in self._groups}
        for i, group in enumerate(groups):
            before = known.get(group.name)
            if before is not None and before.is_packed(group):
                groups[i] = before
        streamed_blocks(self.placement, len(groups) - 1, self.name)
        self._groups = groups

    def _allocate(self) -> None:
        """Take all the memory that the stay takes."""
        streamed = [i + 1 for i in streamed_blocks(self.placement, len(self._groups) - 1)]
        self._turns = {group: turn for turn, group in enumerate(streamed)}
        if streamed:
            groups = [self._groups[i] for i in streamed]
            self._ring = BlockBufferPool(self.device, self.loader, groups, self.placement)
        for i, group in enumerate(self._groups):
            if i not in self._turns and group.nbytes:
                buffer = self.device.allocate(group.nbytes)
                self._buffers.append(buffer)

    def _send(self) -> None:
        """Start all deliveries, about in the order in which they are needed."""
        staying = [i for i, group in enumerate(self._groups) if i not in self._turns and group.nbytes]
        for i, buffer in zip(staying, self._buffers, strict=True):
            group = self._groups[i]
            delivery = self.loader.send(group, buffer, self.placement.source)
            self._deliveries.append(delivery)
            self._expected[i] = delivery
            BlockBuffer(buffer).bind(group)
            if i == 0 and self._ring:
                self._ring.fill()
        if self._ring:
            self._ring.fill()

    def _await(self, index: int) -> None:
        if index in self._expected:
            self.device.wait(self._expected[index].mark())
            del self._expected[index]

    def _hooks(self, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return what runs before and after the block of a group."""

        # Compiled along with a block, they would run only once, when it is traced.
        @torch.compiler.disable
        def before(block: nn.Module, args: Any) -> None:
            self._await(index)
            if self._ring and index in self._turns:
                self._ring.enter(self._turns[index])

        @torch.compiler.disable
        def after(block: nn.Module, args: Any, output: Any) -> None:
            if self._ring and index in self._turns:
                self._ring.leave()

        return before, after
