"""How a model's weights are packed for transfers: one run of bytes for each block, and one for the rest.

The bytes that a placement takes on the device follow from that before anything is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...checkpoints.deferred import DeferredWeight
from ...checkpoints.loading.alignment import is_aligned
from ...checks import check_choice, check_positive_int
from ...host_memory import FileMappings, MappedFile, read_ahead
from ...private_apis import own_tensors

# Alignment of packed tensors: the most that kernels ask for.
ALIGNMENT = 256
_LIES_WELL = "lies_well"  # attribute of weights on meta
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
            pool of buffers as they are called; "host" runs on the CPU: beside a GPU its blocks pass through
            scratch memory, see `on_host`.
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
    host: torch.Tensor  # where it is kept; a DeferredWeight is converted as it is read
    shape: torch.Size
    stride: tuple[int, ...]  # stride when packed, dense whatever the host tensor's is
    offset: int  # its first byte in the block
    nbytes: int
    mapped: torch.Tensor | None = None  # the tensor in its file, if it was moved to pinned memory from there
    # Modules with their names of a deferred weight: another parameter takes its place while it is converted.
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    _whole: torch.Tensor | None = None  # converted, while it is read piece by piece

    def view_in(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a block's bytes."""
        tensor = torch.empty(0, dtype=self.host.dtype, device=packed.device)
        start = (packed.storage_offset() + self.offset) // tensor.itemsize
        return tensor.set_(packed.untyped_storage(), start, self.shape, self.stride)

    def read(self, target: torch.Tensor, first: int, last: int) -> None:
        """Fill target with the tensor's bytes in packed order, from the first one to before the last."""
        host, size = self.host, self.host.itemsize
        if isinstance(host, DeferredWeight):
            values = host.stored_values()
            if values is not None and not (first % size or last % size or target.storage_offset() % size):
                target.view(host.dtype).copy_(values[first // size : last // size])
                return
            self._whole = host.dequantize() if self._whole is None else self._whole
            host = self._whole
        if host.stride() != self.stride:
            host = torch.empty_strided(self.shape, self.stride, dtype=host.dtype).copy_(host)
        start = host.storage_offset() * size
        whole = torch.empty(0, dtype=torch.uint8).set_(host.untyped_storage(), start, (self.nbytes,), (1,))
        target.copy_(whole[first:last])
        if last == self.nbytes:
            self._whole = None

    @property
    def stored(self) -> torch.Tensor | None:
        """What is read for the tensor; None: it is quantised."""
        return self.host.stored_values() if isinstance(self.host, DeferredWeight) else self.host

    def point_to(self, tensor: torch.Tensor) -> None:
        """Make the owners use another tensor's memory."""
        if isinstance(tensor, DeferredWeight):
            for module, name in self.places:
                module.register_parameter(name, tensor)  # type: ignore[arg-type]
            self.owners[0].data = tensor.new_empty(0)
            return
        for owner in self.owners:
            owner.data = tensor
        for module, name in self.places:
            module.register_parameter(name, self.owners[0])  # type: ignore[arg-type]


@dataclass
class PackedBlock:
    """Weights that are transferred together."""

    name: str  # the model's name and the block's number, or "rest"
    tensors: list[PackedTensor] = field(default_factory=list)  # in packed order
    nbytes: int = 0
    pinned: torch.Tensor | None = None  # the packed bytes, if the tensors are kept in pinned memory
    files: set[MappedFile] = field(default_factory=set)  # that the tensors are read from

    def add(self, tensor: torch.Tensor) -> PackedTensor:
        """Append a tensor."""
        host, owner = tensor.data, tensor
        if isinstance(tensor, DeferredWeight):
            host, owner = tensor, tensor.stand_in()
        stride = torch.empty_like(host, device="meta").stride()  # its own, if it is dense
        packed = PackedTensor([owner], host, host.shape, stride, _ceil(self._end, ALIGNMENT), host.nbytes)
        self.tensors.append(packed)
        self.nbytes = _ceil(self._end, GRAIN)
        return packed

    @property
    def _end(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].nbytes if self.tensors else 0

    def read(self, target: torch.Tensor, start: int) -> None:
        """Fill target with the packed bytes from start on; padding is left as it is.

        An OSError names a file that was cut off meanwhile.
        """
        for file in self.files:
            file.check()
        end = start + target.nbytes
        for tensor in self.tensors:
            first, last = max(start, tensor.offset), min(end, tensor.offset + tensor.nbytes)
            if first < last:
                part = target[first - start : last - start]
                tensor.read(part, first - tensor.offset, last - tensor.offset)

    def find_files(self, mappings: FileMappings) -> None:
        """Find the files that the tensors are read from."""
        stored = [tensor.stored for tensor in self.tensors]
        self.files = {file for tensor in stored if tensor is not None and (file := mappings.find(tensor))}

    def read_ahead(self) -> None:
        """Ask the system to read the files before they are needed."""
        for tensor in self.tensors:
            if tensor.stored is not None:
                read_ahead(tensor.stored)

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
            if tensor.mapped is not None and tensor.owners[0].data_ptr() == tensor.host.data_ptr():
                tensor.point_to(tensor.mapped)


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


def packed_blocks(model: nn.Module, name: str = "model", host: bool = False) -> list[PackedBlock]:
    """Return a model's weights outside of its blocks, then each block's; a tied tensor is in the first.

    For the `host` itself, weights that can be computed with where they lie are left out.
    """
    blocks = blocks_of(model)
    parts = [(f"{name}.rest", _tensors(model, blocks))]
    parts += [(f"{name}.{i}", _tensors(block)) for i, block in enumerate(blocks)]
    packed: list[PackedBlock] = []
    known: dict[Any, PackedTensor] = {}
    for title, tensors in parts:
        block = PackedBlock(title)
        for module, attribute, tensor in tensors:
            if host and _stays(module, tensor):
                continue
            if type(tensor) not in (nn.Parameter, torch.Tensor, DeferredWeight):
                kind = type(tensor).__name__
                raise ValueError(f"{name} has weights of class {kind}, which cannot be moved one by one")
            key = _tied_key(tensor)
            if key not in known:
                known[key] = block.add(tensor)
            elif not any(tensor is owner for owner in known[key].owners) and not known[key].places:
                known[key].owners.append(tensor)
            if isinstance(tensor, DeferredWeight):
                known[key].places.append((module, attribute))
        packed.append(block)
    return packed


def _stays(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether the CPU computes with a weight where it lies; the copy of one on meta knows of the original."""
    if isinstance(module, nn.Embedding):  # it looks up rows, wherever they lie and in whatever dtype
        return True
    if tensor.is_meta:
        return getattr(tensor, _LIES_WELL, False)
    return not isinstance(tensor, DeferredWeight) and is_aligned(module, tensor)


def mark_where_it_lies(copy: torch.Tensor, tensor: torch.Tensor) -> None:
    """Let a weight's copy on meta count, for the host, as the weight does where it lies."""
    known = getattr(tensor, _LIES_WELL, False) if tensor.is_meta else None
    setattr(copy, _LIES_WELL, _stays(nn.Module(), tensor) if known is None else known)


def on_host(model: nn.Module) -> Placement:
    """Return the placement, on the host's device, of a model that runs there beside a GPU."""
    return Placement("streamed" if len(blocks_of(model)) > 2 else "on_demand")


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
    return sum(map(_bytes, {_tied_key(tensor): tensor for _, _, tensor in _tensors(model)}.values()))


def device_bytes(model: nn.Module, placement: Placement, host: bool = False) -> int:
    """Return the bytes on the device while a model runs; the model may be on meta.

    `host`: on the host's device, in scratch memory.
    """
    if placement.kind == "host":
        return device_bytes(model, on_host(model), host=True) if host else 0
    blocks = packed_blocks(model, host=host)
    streamed = {i + 1 for i in streamed_blocks(placement, len(blocks) - 1)}
    buffers = placement.buffers * max((blocks[i].nbytes for i in streamed), default=0)
    return buffers + sum(block.nbytes for i, block in enumerate(blocks) if i not in streamed)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tensors(
    module: nn.Module, without: Iterable[nn.Module] = ()
) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for tensors in own_tensors(module):
        yield from ((module, name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for child in module.children():
        if not any(child is other for other in without):
            yield from _tensors(child, without)


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _tied_key(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, DeferredWeight):
        return id(tensor.source)
    if tensor.is_meta or not tensor.numel() or hasattr(tensor, "__tensor_flatten__"):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
