"""How a model's weights are packed for transfers: one run of bytes for each block, and one for the rest.

The bytes that a placement takes on the device follow from that before anything is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...checks import check_choice, check_positive_int
from ...private_apis import own_tensors

# Alignment of packed tensors: the most that kernels ask for.
ALIGNMENT = 256
# Rounding of PyTorch's CUDA allocator.
GRAIN = 512

Kind = Literal["resident", "on_demand", "streamed", "host"]
Source = Literal["mmap", "pinned"]


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are while a pipeline runs.

    Args:
        kind: "resident" stays on the device after its first call; "on_demand" is there from its call until
            another model's; "streamed" is on demand with some of its blocks, while the others pass through a
            pool of buffers as they are called; "host" runs on the CPU.
        resident_blocks: blocks of a streamed model that do not pass through buffers; they are spread evenly.
        buffers: blocks in a streamed model's pool, 2 or 3.
        source: where weights are kept on the host: "mmap" leaves them where they are, in a file say, and
            stages them through a small pinned buffer; "pinned" moves them to pinned memory, which is faster.
    """

    kind: Kind
    resident_blocks: int = 0
    buffers: int = 2
    source: Source = "mmap"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("source", self.source, get_args(Source))
        for name, least, most in (("buffers", 2, 3), ("resident_blocks", 0, None)):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name), most, least))
        if self.resident_blocks and self.kind != "streamed":
            raise ValueError(
                f"resident_blocks={self.resident_blocks} is for streamed models, not {self.kind}"
            )


@dataclass
class PackedTensor:
    """A tensor and its place among the bytes of its block."""

    owners: list[torch.Tensor]  # parameters and buffers that are this tensor, more than one if they are tied
    host: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]  # stride when packed, dense whatever the host tensor's is
    offset: int  # its first byte in the block
    nbytes: int
    mapped: torch.Tensor | None = None  # the tensor in its file, if it was moved to pinned memory from there

    def view_in(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a block's bytes."""
        tensor = torch.empty(0, dtype=self.host.dtype, device=packed.device)
        start = (packed.storage_offset() + self.offset) // tensor.itemsize
        return tensor.set_(packed.untyped_storage(), start, self.shape, self.stride)

    def host_bytes(self) -> torch.Tensor:
        """Return the tensor's bytes in packed order."""
        host = self.host
        if host.stride() != self.stride:
            host = torch.empty_strided(self.shape, self.stride, dtype=host.dtype).copy_(host)
        start = host.storage_offset() * host.itemsize
        return torch.empty(0, dtype=torch.uint8).set_(host.untyped_storage(), start, (self.nbytes,), (1,))

    def point_to(self, tensor: torch.Tensor) -> None:
        """Make the owners use another tensor's memory."""
        for owner in self.owners:
            owner.data = tensor


@dataclass
class PackedBlock:
    """Weights that are transferred together."""

    name: str  # the model's name and the block's number, or "rest"
    tensors: list[PackedTensor] = field(default_factory=list)  # in packed order
    nbytes: int = 0
    pinned: torch.Tensor | None = None  # the packed bytes, if the tensors are kept in pinned memory

    def add(self, tensor: torch.Tensor) -> PackedTensor:
        """Append a tensor."""
        host = tensor.data
        stride = torch.empty_like(host, device="meta").stride()  # its own, if it is dense
        packed = PackedTensor([tensor], host, host.shape, stride, _ceil(self._end, ALIGNMENT), host.nbytes)
        self.tensors.append(packed)
        self.nbytes = _ceil(self._end, GRAIN)
        return packed

    @property
    def _end(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].nbytes if self.tensors else 0

    def read(self, target: torch.Tensor, start: int) -> None:
        """Fill target with the packed bytes from start on; padding is left as it is."""
        end = start + target.nbytes
        for tensor in self.tensors:
            first, last = max(start, tensor.offset), min(end, tensor.offset + tensor.nbytes)
            if first < last:
                source = tensor.host_bytes()[first - tensor.offset : last - tensor.offset]
                target[first - start : last - start].copy_(source)

    def is_pinned_for(self, other: "PackedBlock") -> bool:
        """Whether another block has the same weights, and this one keeps them in pinned memory."""
        if self.pinned is None or len(self.tensors) != len(other.tensors):
            return False
        return all(
            [id(owner) for owner in mine.owners] == [id(owner) for owner in its.owners]
            and mine.host.data_ptr() == its.host.data_ptr()
            and (mine.host.dtype, mine.shape, mine.stride) == (its.host.dtype, its.shape, its.stride)
            for mine, its in zip(self.tensors, other.tensors, strict=True)
        )

    def point_to_host(self) -> None:
        """Make all owners use the tensors on the host."""
        for tensor in self.tensors:
            tensor.point_to(tensor.host)

    def unpin(self) -> None:
        """Make owners of pinned tensors use the mapped ones again, unless they were given others since."""
        for tensor in self.tensors:
            for owner in tensor.owners:
                if tensor.mapped is not None and owner.data_ptr() == tensor.host.data_ptr():
                    owner.data = tensor.mapped


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model declares as repeated, in order; none if it declares nothing."""
    names = {
        *(getattr(model, "_repeated_blocks", None) or ()),
        *(getattr(model, "_no_split_modules", None) or ()),
    }
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = list(module)
            # fully_shard derives a class for each block.
            if all(any(base.__name__ in names for base in type(block).__mro__) for block in blocks):
                return blocks
    return []


def packed_blocks(model: nn.Module, name: str = "model") -> list[PackedBlock]:
    """Return a model's weights outside of its blocks, then each block's; a tied tensor is in the first."""
    blocks = blocks_of(model)
    parts = [(f"{name}.rest", _tensors(model, blocks))]
    parts += [(f"{name}.{i}", _tensors(block)) for i, block in enumerate(blocks)]
    packed: list[PackedBlock] = []
    known: dict[Any, PackedTensor] = {}
    for title, tensors in parts:
        block = PackedBlock(title)
        for tensor in tensors:
            if type(tensor) not in (nn.Parameter, torch.Tensor):
                kind = type(tensor).__name__
                raise ValueError(f"{name} has weights of class {kind}, which cannot be moved one by one")
            key = _tied_key(tensor)
            if key not in known:
                known[key] = block.add(tensor)
            elif not any(tensor is owner for owner in known[key].owners):
                known[key].owners.append(tensor)
        packed.append(block)
    return packed


def streamed_blocks(placement: Placement, count: int, name: str = "model") -> list[int]:
    """Return which of a model's `count` blocks pass through buffers."""
    if placement.kind != "streamed":
        return []
    if not count:
        raise ValueError(f"{name} has no blocks to stream; place it on demand")
    stay = placement.resident_blocks
    if stay > count:
        raise ValueError(f"resident_blocks={stay}, but {name} has {count} blocks")
    passing = [i for i in range(count) if (i + 1) * stay // count == i * stay // count]
    # With a buffer for each block, all are resident.
    return passing if len(passing) > placement.buffers else []


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights, torchao's included; tied ones count once."""
    return sum(map(_bytes, {_tied_key(tensor): tensor for tensor in _tensors(model)}.values()))


def device_bytes(model: nn.Module, placement: Placement) -> int:
    """Return the bytes on the device while a model runs; the model may be on meta."""
    if placement.kind == "host":
        return 0
    blocks = packed_blocks(model)
    streamed = {i + 1 for i in streamed_blocks(placement, len(blocks) - 1)}
    buffers = placement.buffers * max((blocks[i].nbytes for i in streamed), default=0)
    return buffers + sum(block.nbytes for i, block in enumerate(blocks) if i not in streamed)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tensors(module: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[torch.Tensor]:
    for tensors in own_tensors(module):
        yield from (tensor for tensor in tensors.values() if tensor is not None)
    for child in module.children():
        if not any(child is other for other in without):
            yield from _tensors(child, without)


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _tied_key(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or not tensor.numel() or hasattr(tensor, "__tensor_flatten__"):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
