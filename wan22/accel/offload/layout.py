"""How a model's weights lie in memory when they travel: one slab of bytes for each block, one for the rest.

What a placement takes on the device follows from that, to the byte, before anything is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...checks import check_choice
from ...private_apis import own_tensors

# Where tensors of a slab begin: what kernels ask for at most.
ALIGNMENT = 256
# What PyTorch's CUDA allocator rounds to, so that its counts are ours.
GRAIN = 512

Kind = Literal["resident", "on_demand", "streamed", "host"]
Source = Literal["mmap", "pinned"]


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are while a pipeline runs.

    Args:
        kind: "resident" stays on the device once it is there; "on_demand" is there from when it is called
            until another model is; "streamed" is so with a part of its blocks, and the others pass through
            buffers as they are called; "host" runs on the CPU.
        resident_blocks: of a streamed model, blocks that stay as long as it does; they are spread evenly.
        buffers: of a streamed model, room for so many blocks on their way, 2 or 3.
        source: where the weights are otherwise. "mmap": where they are, for those of a file in the file, and
            they reach the device through a small pinned buffer. "pinned": in pinned memory, which takes the
            place of where they were and is faster.

    Raises:
        ValueError: a value breaks its rule.
    """

    kind: Kind
    resident_blocks: int = 0
    buffers: int = 2
    source: Source = "mmap"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("source", self.source, get_args(Source))
        if self.buffers not in (2, 3):
            raise ValueError(f"buffers={self.buffers!r} must be 2 or 3")
        if self.resident_blocks < 0:
            raise ValueError(f"resident_blocks={self.resident_blocks!r} must be at least 0")
        if self.resident_blocks and self.kind != "streamed":
            raise ValueError(
                f"resident_blocks={self.resident_blocks} is for streamed models, not {self.kind}"
            )


@dataclass
class PackedTensor:
    """A tensor in a slab.

    Args:
        owners: the parameters and buffers, more than one if they are tied, that are this tensor.
        host: it, where it is on the host.
        shape: of the tensor.
        stride: likewise; dense, whatever the host tensor's is.
        offset: of its first byte in the slab.
        nbytes: how many it has.
        mapped: it, in the file where it was before it was pinned.
    """

    owners: list[torch.Tensor]
    host: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    mapped: torch.Tensor | None = None

    def view_in(self, slab: torch.Tensor) -> torch.Tensor:
        """Return the tensor that lies in a slab."""
        tensor = torch.empty(0, dtype=self.host.dtype, device=slab.device)
        start = (slab.storage_offset() + self.offset) // tensor.itemsize
        return tensor.set_(slab.untyped_storage(), start, self.shape, self.stride)

    def host_bytes(self) -> torch.Tensor:
        """Return the tensor's bytes, in the order in which they lie in a slab."""
        host = self.host
        if host.stride() != self.stride:
            host = torch.empty_strided(self.shape, self.stride, dtype=host.dtype).copy_(host)
        start = host.storage_offset() * host.itemsize
        return torch.empty(0, dtype=torch.uint8).set_(host.untyped_storage(), start, (self.nbytes,), (1,))

    def point_to(self, tensor: torch.Tensor) -> None:
        """Let the owners have their values there."""
        for owner in self.owners:
            owner.data = tensor


@dataclass
class PackedBlock:
    """The weights that travel together.

    Args:
        name: for records.
        pieces: in the order in which they lie in a slab.
        nbytes: of the slab.
        slab: on the host, if that is where the pieces are at home.
    """

    name: str
    pieces: list[PackedTensor] = field(default_factory=list)
    nbytes: int = 0
    slab: torch.Tensor | None = None

    def add(self, tensor: torch.Tensor) -> PackedTensor:
        """Append a tensor."""
        host = tensor.data
        stride = torch.empty_like(host, device="meta").stride()  # its own, if it is dense
        piece = PackedTensor([tensor], host, host.shape, stride, _ceil(self._end, ALIGNMENT), host.nbytes)
        self.pieces.append(piece)
        self.nbytes = _ceil(self._end, GRAIN)
        return piece

    @property
    def _end(self) -> int:
        return self.pieces[-1].offset + self.pieces[-1].nbytes if self.pieces else 0

    def read(self, target: torch.Tensor, start: int) -> None:
        """Fill target with the slab's bytes from start on; those between tensors are left as they are."""
        end = start + target.nbytes
        for piece in self.pieces:
            first, last = max(start, piece.offset), min(end, piece.offset + piece.nbytes)
            if first < last:
                source = piece.host_bytes()[first - piece.offset : last - piece.offset]
                target[first - start : last - start].copy_(source)

    def is_packed(self, other: "PackedBlock") -> bool:
        """Whether another group's weights are these, and at home in this group's slab."""
        if self.slab is None or len(self.pieces) != len(other.pieces):
            return False
        return all(
            [id(owner) for owner in mine.owners] == [id(owner) for owner in its.owners]
            and mine.host.data_ptr() == its.host.data_ptr()
            and (mine.host.dtype, mine.shape, mine.stride) == (its.host.dtype, its.shape, its.stride)
            for mine, its in zip(self.pieces, other.pieces, strict=True)
        )

    def point_to_host(self) -> None:
        """Let all owners have their values on the host."""
        for piece in self.pieces:
            piece.point_to(piece.host)

    def unpin(self) -> None:
        """Let the owners have their values where they were mapped, unless they have been given others."""
        for piece in self.pieces:
            for owner in piece.owners:
                if piece.mapped is not None and owner.data_ptr() == piece.host.data_ptr():
                    owner.data = piece.mapped


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model says it repeats, in order; none if it says nothing."""
    names = {
        *(getattr(model, "_repeated_blocks", None) or ()),
        *(getattr(model, "_no_split_modules", None) or ()),
    }
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = list(module)
            # fully_shard gives a block a class of its own, derived from the one that it had.
            if all(any(base.__name__ in names for base in type(block).__mro__) for block in blocks):
                return blocks
    return []


def packed_blocks(model: nn.Module, name: str = "model") -> list[PackedBlock]:
    """Return the rest of a model's weights, and then each block's; a tied tensor is in the first of them.

    Args:
        model: on any device, also on meta.
        name: of the model.

    Raises:
        ValueError: a weight is no ordinary tensor.
    """
    blocks = blocks_of(model)
    parts = [(f"{name}.rest", _tensors(model, blocks))]
    parts += [(f"{name}.{i}", _tensors(block)) for i, block in enumerate(blocks)]
    groups: list[PackedBlock] = []
    known: dict[Any, PackedTensor] = {}
    for title, tensors in parts:
        group = PackedBlock(title)
        for tensor in tensors:
            if type(tensor) not in (nn.Parameter, torch.Tensor):
                kind = type(tensor).__name__
                raise ValueError(f"{name} has weights of class {kind}, which cannot be moved one by one")
            key = _identity(tensor)
            if key not in known:
                known[key] = group.add(tensor)
            elif not any(tensor is owner for owner in known[key].owners):
                known[key].owners.append(tensor)
        groups.append(group)
    return groups


def streamed_blocks(placement: Placement, count: int, name: str = "model") -> list[int]:
    """Return which of a model's blocks pass through buffers; the others stay.

    Args:
        placement: of the model.
        count: its blocks.
        name: the model's.

    Raises:
        ValueError: it has no blocks, or not so many.
    """
    if placement.kind != "streamed":
        return []
    if not count:
        raise ValueError(f"{name} has no blocks to stream; place it on demand")
    stay = placement.resident_blocks
    if stay > count:
        raise ValueError(f"resident_blocks={stay}, but {name} has {count} blocks")
    passing = [i for i in range(count) if (i + 1) * stay // count == i * stay // count]
    # As many buffers as blocks: each has room to stay.
    return passing if len(passing) > placement.buffers else []


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights, torchao's among them; tied ones count once."""
    return sum(map(_bytes, {_identity(tensor): tensor for tensor in _tensors(model)}.values()))


def device_bytes(model: nn.Module, placement: Placement) -> int:
    """Return the bytes that a model's weights take on the device while it is there.

    Args:
        model: on any device, also on meta.
        placement: of the model.

    Raises:
        ValueError: it cannot be placed so.
    """
    if placement.kind == "host":
        return 0
    groups = packed_blocks(model)
    streamed = {i + 1 for i in streamed_blocks(placement, len(groups) - 1)}
    buffers = placement.buffers * max((groups[i].nbytes for i in streamed), default=0)
    return buffers + sum(group.nbytes for i, group in enumerate(groups) if i not in streamed)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tensors(module: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[torch.Tensor]:
    """Yield a module's parameters and buffers, but not those of the modules in it that are left out."""
    for tensors in own_tensors(module):
        yield from (tensor for tensor in tensors.values() if tensor is not None)
    for child in module.children():
        if not any(child is other for other in without):
            yield from _tensors(child, without)


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _identity(tensor: torch.Tensor) -> Any:
    """Return what tied tensors have in common."""
    if tensor.is_meta or not tensor.numel() or hasattr(tensor, "__tensor_flatten__"):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
