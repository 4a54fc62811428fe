"""Read PyTorch's own files, without running the code that may be in them."""

import errno
import io
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...checks import cut, shown
from .pickles import NotPlainError, Tensor, read_pickle

# Tables in tables of one entry, such as {"state_dict": {…}}, that a file's tensors may be inside of.
_NESTED = 8
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in the format from before PyTorch 1.6
_COUNT = 8  # bytes before each record of such a file
# What zipfile and torch.load raise on damaged bytes.
_DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(zipfile.BadZipFile, struct.error),
)


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors, memory-mapped unless it has the format from before PyTorch 1.6.

    Raises: ValueError: it is damaged, or holds anything but tensors; told before PyTorch allocates anything.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    with _errors_named(path):
        content, records = _zip_contents(path) if zipped else _old_contents(path)
    tensors = _table_in(content, str(path), Tensor)
    with _errors_named(path):
        _check_sizes(tensors, records, path.stat().st_size)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    return tensors_in(state, str(path))


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Let errors name the file: those of the checks here, of zipfile, and of PyTorch on damaged bytes."""
    try:
        yield
    except (NotPlainError, pickle.UnpicklingError) as error:
        what = f" ({cut(error)})" if isinstance(error, NotPlainError) else ""
        raise ValueError(
            f"{path} holds Python code beside its tensors; it is not run, and so the file is not read{what}"
        ) from error
    except _DAMAGED as error:
        if os.strerror(errno.ENOMEM) in str(error):
            raise MemoryError(
                f"{path} has {path.stat().st_size / 1e9:.1f} GB, and PyTorch does not map a file of its own "
                "format that is larger than the host's memory; a file in safetensors may be larger"
            ) from error
        raise ValueError(f"{path} is cut off or damaged: {cut(' '.join(str(error).split()))}") from error


def tensors_in(state: Any, source: str) -> dict[str, torch.Tensor]:
    """Return the tensors of what was saved, which may be in another table; `source` is it, for errors."""
    return dict(_table_in(state, source, torch.Tensor))


def _table_in(state: Any, source: str, kind: type[Any]) -> Mapping[str, Any]:
    """Return the table of tensors, all of one class, that something is or has in it."""
    for _ in range(_NESTED):
        if isinstance(state, Mapping) and len(state) == 1 and isinstance(next(iter(state.values())), Mapping):
            (state,) = state.values()  # {"state_dict": …}
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} holds a {type(state).__name__}, not a table of tensors")
    if not state:
        raise ValueError(f"{source} holds no tensors")
    for key, value in state.items():
        if not isinstance(value, kind) or not isinstance(key, str):
            raise ValueError(f"{source} holds {shown(key)}, which is no tensor")
    return state


# What a file's pickle holds, and the bytes of its records by their names there.
_Contents = tuple[Any, Mapping[str, int]]


def _zip_contents(path: Path) -> _Contents:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its records have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its records are compressed; torch.save writes them as they are")
        pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records data.pkl, torch.save writes one")
        start = pickles[0].filename.removesuffix("data.pkl") + "data/"
        own = [entry for entry in entries if entry.filename.startswith(start)]
        content = read_pickle(io.BytesIO(archive.read(pickles[0]))).content
        return content, {entry.filename.removeprefix(start): entry.file_size for entry in own}


def _old_contents(path: Path) -> _Contents:
    """Read pickles one after another; records follow, each a count of numbers and the numbers."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        magic = read_pickle(mapped).content
        if magic != _MAGIC:
            raise ValueError(f"it begins with {shown(magic)}, unlike PyTorch's files")
        _version, _machine, saved, names = (read_pickle(mapped) for _ in range(4))
        left = len(mapped) - mapped.tell()
        records: dict[str, int] = {}
        for name, storage in saved.storages.items():
            left -= _COUNT + storage.nbytes
            records[name] = storage.nbytes if left >= 0 and name in names.content else 0
        return saved.content, records


def _check_sizes(tensors: Mapping[str, Tensor], records: Mapping[str, int], size: int) -> None:
    """Refuse tensors that are not in the file, for which PyTorch would allocate what the pickle says."""
    repeated = 0
    for name, tensor in tensors.items():
        needed, held = tensor.storage.nbytes, records.get(tensor.storage.key, 0)
        if held < needed:
            raise ValueError(f"of {cut(name)} there are {held} of {needed} bytes")
        repeated += tensor.repeated_bytes
    if repeated > size:
        rule = "it may have as many of them as the file has bytes"
        raise ValueError(f"it names numbers again and again, for tensors of {repeated} bytes; {rule}: {size}")
