"""Read GGUF: plain tensors, and blocks that stay quantised."""

import math
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from struct import calcsize, unpack_from
from typing import Any

import torch

from ...checks import cut, shown
from ...extras import install_command
from .quantized import GgufBlocks, QuantizedTensor
from .safetensors import mapped_file

# Source: ggml docs/gguf.md. Codes of the kinds of values; below, of tensors, where they are plain.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VERSIONS = (2, 3)
_MOST_AXES = 8  # ggml has four, but Python's gguf writes as many as there are
_ALIGNMENT, _LARGEST_ALIGNMENT = 32, 2**20
_LONGEST_NAME, _LONGEST_TEXT = 2**16, 2**26  # bytes
_KEPT = 64  # numbers of an array that is returned: sizes are; longer ones are passed over, as texts are
_OWN_SHAPE = "comfy.gguf.orig_shape."


def read_gguf(path: Path) -> tuple[dict[str, torch.Tensor | QuantizedTensor], dict[str, Any]]:
    """Return a file's tensors, memory-mapped, and its metadata without long arrays.

    Raises: ImportError: the package gguf is missing. ValueError: the file is damaged, or has a type of blocks
        that cannot be read; all of the header is held against the file first.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path} is GGUF; to read it: {install_command('gguf')}") from error
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    data = mapped_file(path)
    try:
        header = _Header(data)
        fields = header.fields()
        places = [header.place(sizes) for _ in range(header.tensors)]
        start = header.end_of_head(fields.get("general.alignment", _ALIGNMENT))
    except ValueError as error:
        raise ValueError(f"{path} is cut off or damaged: {cut(error)}") from error
    _check_places(path, places, start, len(data))
    tensors: dict[str, torch.Tensor | QuantizedTensor] = {}
    for place in places:
        shape = fields.get(_OWN_SHAPE + place.name, list(place.shape))
        try:
            if not isinstance(shape, list) or math.prod(map(int, shape)) != math.prod(place.shape):
                rule = f"is not that of {math.prod(place.shape)} values"
                raise ValueError(f"its shape, {shown(shape)}, {rule}")
            first, own = start + place.offset, tuple(int(n) for n in shape)
            stored = torch.frombuffer(data, dtype=torch.uint8, count=place.nbytes, offset=first)
            tensors[place.name] = gguf_tensor(stored.view(*place.shape[:-1], -1), place.kind, own)
        except ValueError as error:
            raise ValueError(f"{path}: {cut(place.name)}: {error}") from error
    return tensors, fields


def gguf_tensor(data: torch.Tensor, kind: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedTensor:
    """Return the tensor whose values have a shape; `kind` is GGUF's name of the type of what is stored."""
    if kind in _PLAIN:
        return data.view(_PLAIN[kind]).reshape(shape)
    return QuantizedTensor(shape, GgufBlocks(kind, shape), {"data": data})


@dataclass(frozen=True)
class _Place:
    """What the header says of a tensor."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of its values; the file lists the innermost axis first
    offset: int  # bytes from the start of the data
    nbytes: int


class _Header:
    """Reads the header from its start to its end; each size is held against what is left of the file."""

    def __init__(self, data: mmap) -> None:
        self._data, self._position = data, 4  # after the magic
        (version,) = self._numbers("I")
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            raise ValueError(f"its version is {version}; {known} are read, in little-endian order")
        self.tensors, self._fields = self._numbers("QQ")

    def fields(self) -> dict[str, Any]:
        """Return the metadata."""
        fields: dict[str, Any] = {}
        for _ in range(self._fields):
            name = self._text(_LONGEST_NAME)
            if name in fields:
                raise ValueError(f"it has the entry {cut(name)} twice")
            (kind,) = self._numbers("I")
            try:
                fields[name] = self._array() if kind == _ARRAY else self._value(kind)
            except ValueError as error:
                raise ValueError(f"its entry {cut(name)}: {error}") from error
        return {name: value for name, value in fields.items() if value is not None}

    def place(self, sizes: dict[int, tuple[str, int, int]]) -> _Place:
        """Return the next tensor's place; `sizes` are the name, values and bytes of a block of each kind."""
        name = self._text(_LONGEST_NAME)
        (count,) = self._numbers("I")
        if count > _MOST_AXES:
            raise ValueError(f"{cut(name)} has {count} axes, at most {_MOST_AXES} are possible")
        shape = self._numbers("Q" * count)[::-1]
        kind, offset = self._numbers("IQ")
        if kind not in sizes:
            raise ValueError(f"{cut(name)} is of type {kind}, which is unknown")
        type_name, values, nbytes = sizes[kind]
        if 0 in shape or (shape or (1,))[-1] % values:
            rule = f"rows of {type_name} have a multiple of {values} values, and at least one"
            raise ValueError(f"{cut(name)} has the shape {shape}; {rule}")
        return _Place(name, type_name, shape, offset, math.prod(shape) // values * nbytes)

    def end_of_head(self, alignment: Any) -> int:
        """Return where the data starts, after padding."""
        known = isinstance(alignment, int) and 8 <= alignment <= _LARGEST_ALIGNMENT
        if not known or alignment & (alignment - 1):
            rule = f"a power of two from 8 to {_LARGEST_ALIGNMENT}"
            raise ValueError(f"general.alignment is {shown(alignment)}; it must be {rule}")
        return self._position + -self._position % alignment

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text(_LONGEST_TEXT)
        if kind not in _NUMBERS:
            raise ValueError(f"a value of kind {kind} is unknown")
        return self._numbers(_NUMBERS[kind])[0]

    def _array(self) -> list[Any] | None:
        kind, count = self._numbers("IQ")
        if kind == _TEXT:
            self._check_left(count * 8)
            for _ in range(count):
                (size,) = self._numbers("Q")
                self._check_left(size)
                self._position += size
            return None
        if kind not in _NUMBERS:
            raise ValueError(f"an array of kind {kind} is not read")
        size = count * calcsize(f"<{_NUMBERS[kind]}")
        self._check_left(size)
        if count > _KEPT:
            self._position += size
            return None
        return list(self._numbers(_NUMBERS[kind] * count))

    def _text(self, longest: int) -> str:
        (size,) = self._numbers("Q")
        if size > longest:
            raise ValueError(f"a text or name has {size} bytes; at most {longest} are read")
        self._check_left(size)
        start, self._position = self._position, self._position + size
        return self._data[start : self._position].decode()

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        size = calcsize(f"<{letters}")
        self._check_left(size)
        self._position += size
        return unpack_from(f"<{letters}", self._data, self._position - size)

    def _check_left(self, size: int) -> None:
        if size > (left := len(self._data) - self._position):
            raise ValueError(f"{size} bytes of its header are to follow, but the file ends after {left}")


def _check_places(path: Path, places: list[_Place], start: int, size: int) -> None:
    """Refuse tensors of one name, that overlap each other, or that reach beyond the file."""
    names: set[str] = set()
    end, before = 0, "the header"
    for place in sorted(places, key=lambda place: place.offset):
        if place.name in names:
            raise ValueError(f"{path} is damaged: it has {cut(place.name)} twice")
        if place.offset < end:
            raise ValueError(f"{path} is damaged: {cut(place.name)} overlaps {cut(before)}")
        end, before = place.offset + place.nbytes, place.name
        if start + end > size:
            raise ValueError(f"{path} is cut off: {cut(place.name)} ends at byte {start + end} of {size}")
        names.add(place.name)
