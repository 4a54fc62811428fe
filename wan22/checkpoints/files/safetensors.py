"""Read and write safetensors: the header, the dtypes, the tensors."""

import json
import math
import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ...checks import cut
from ...progress import advance

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIGNMENT = 64  # bytes: where weights that are mapped need no copy; see loading/alignment.py

_DTYPES = STORED_DTYPES | {
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAP_NORESERVE = 0x4000  # which Python's mmap does not name


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Return a safetensors file's tensor table, key to dtype, shape and byte offsets, and its metadata."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{path} is not a whole safetensors file: its header claims {length} of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a table")
    metadata = header.pop("__metadata__", None) or {}
    if wrong := [name for name, entry in header.items() if not _is_entry(entry)]:
        raise ValueError(
            f"{path} is not a safetensors file: its header says nothing of use of {wrong[0][:100]!r}"
        )
    return header, metadata


def _is_entry(entry: Any) -> bool:
    """Whether a header's entry has what a tensor needs."""
    places = entry.get("data_offsets") if isinstance(entry, dict) else None
    whole = isinstance(places, list) and len(places) == 2 and all(isinstance(place, int) for place in places)
    return whole and isinstance(entry.get("dtype"), str) and isinstance(entry.get("shape"), list)


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype | None:
    """Return the dtype of most bytes of a folder's safetensors files; None without any, and for float8.

    `variant` is a part of the files' names, such as "fp16", if there are such; None: the files without one.
    """
    files = sorted(folder.glob("*.safetensors"))
    files = [f for f in files if (f".{variant}" in f.name if variant else "." not in f.stem)] or files
    sizes: Counter[torch.dtype | None] = Counter()
    for file in files:
        for entry in read_header(file)[0].values():
            if entry["dtype"] in STORED_DTYPES or entry["dtype"].startswith("F8"):
                start, end = entry["data_offsets"]
                sizes[STORED_DTYPES.get(entry["dtype"])] += end - start
    return sizes.most_common(1)[0][0] if sizes else None


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a file's tensors, memory-mapped, and its metadata."""
    header, metadata = read_header(path)
    try:
        with safe_open(path, "np"):  # which checks the header against the file
            pass
    except SafetensorError as error:
        needed = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        raise ValueError(f"{path} is cut off or damaged: {error}; its tensors take {needed} bytes") from error
    except OSError as error:
        raise _not_mapped(path, error) from error
    mapped = mapped_file(path)
    start = 8 + int.from_bytes(mapped[:8], "little")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {cut(name)} is of dtype {entry['dtype']}, which cannot be read")
        dtype, count = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
        offset = start + entry["data_offsets"][0]
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset) if count else None
        tensors[name] = (torch.empty(0, dtype=dtype) if flat is None else flat).view(entry["shape"])
    return tensors, metadata


def mapped_file(path: Path) -> mmap.mmap:
    """Map a whole file as `mapping` does; an OSError names the file."""
    with path.open("rb") as file:
        try:
            return mapping(file)
        except OSError as error:
            raise _not_mapped(path, error) from error


def _not_mapped(path: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return OSError(f"{path} cannot be mapped into memory ({reason}); copy it to a disk of this machine")


def mapping(file: BinaryIO) -> mmap.mmap:
    """Map a whole file into memory that can be written to without changing the file.

    Linux refuses such a mapping of a file that is larger than its memory, as all of it might be written to,
    unless it is asked to reserve nothing.
    """
    if sys.platform == "linux":
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


# ---- writing ----


class Entry(Protocol):
    """A tensor to be written."""

    @property
    def key(self) -> str:
        """Its name in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yield its values, in order, in tensors of its dtype."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written as it is."""

    key: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.tensor.nbytes

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yield it whole, from whatever device it is on."""
        yield self.tensor.cpu()


def can_be_written(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an ordinary one with values, of a dtype that is written."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta and tensor.dtype in _CODES
    )


def write_safetensors(path: Path, tensors: Iterable[Entry]) -> None:
    """Write a file piece by piece, where safetensors' own function takes all tensors at once.

    The header is padded with spaces, so that tensors begin at multiples of `ALIGNMENT`; those that do not
    fill whole multiples come last. `advance` of wan22.progress counts the bytes. The file is on the disk
    when the function returns; a file that cannot be finished is removed.
    """
    tensors = sorted(tensors, key=_place)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.key] = {"dtype": _CODES[tensor.dtype], **place}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                for piece in tensor.pieces():
                    file.write(as_bytes(piece).numpy().data)
                    advance(piece.nbytes)
            file.flush()
            os.fsync(file.fileno())  # before a name says that it is finished
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _place(tensor: Entry) -> tuple[bool, int]:
    """Sort key: whole multiples of the alignment in the order given, then the rest, wide numbers first."""
    rest = tensor.nbytes % ALIGNMENT != 0
    return rest, -tensor.dtype.itemsize if rest else 0


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, in a row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
