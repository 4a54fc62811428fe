"""Read weight files: safetensors in one file or in shards, PyTorch's .pth, GGUF.

What a file is, is told from its first bytes, never from its name. Tensors stay memory-mapped: reading a
checkpoint costs no memory before its weights are used.
"""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .quantized import GgufBlocks, QuantizedTensor

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".gguf")
SAMPLES = 1000
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(path: Path) -> dict[str, dict]:
    """Return a safetensors file's tensor table: key to dtype, shape and byte offsets.

    Raises:
        ValueError: the file is not safetensors, or is cut off.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Return a safetensors file's tensor table and its metadata."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{path} is not a whole safetensors file: its header claims {length} of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a table")
    metadata = header.pop("__metadata__", {})
    return header, metadata


def weight_files(path: Path) -> list[Path]:
    """Return the weight files that a path names: itself, or those of the folder, in order."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_ENDINGS]


def fingerprint(path: Path) -> str:
    """Return what tells a weight file from others, without reading it whole.

    Its size, its header with every tensor's name and shape, and some values of each tensor are hashed: a
    fine-tuned checkpoint has the same header, but other values. Of formats other than safetensors it is the
    beginning, and samples all over the file.
    """
    stat = path.stat()
    return _fingerprint(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _fingerprint(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] == b"{":
            header, data = read_header(path), 8 + int.from_bytes(start[:8], "little")
            digest.update(start[8:] + file.read(data - 9))
            places = sorted(data + entry["data_offsets"][0] for entry in header.values())
        else:
            places = [i * size // SAMPLES for i in range(SAMPLES)]
        for place in places:
            file.seek(place)
            digest.update(file.read(256))
    return f"sha256:{digest.hexdigest()}"


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype | None:
    """Return the floating dtype in which most bytes of a component's safetensors weights are stored.

    Args:
        folder: of one component in the Diffusers layout, with one file or several shards.
        variant: such as "fp16": only files named so are read, if there are any; None: only those without one.

    Returns: the dtype, or None without safetensors files.
    """
    files = sorted(folder.glob("*.safetensors"))
    files = [f for f in files if (f".{variant}" in f.name if variant else "." not in f.stem)] or files
    sizes: Counter[torch.dtype] = Counter()
    for file in files:
        for entry in read_header(file).values():
            if entry["dtype"] in STORED_DTYPES:
                start, end = entry["data_offsets"]
                sizes[STORED_DTYPES[entry["dtype"]]] += end - start
    return sizes.most_common(1)[0][0] if sizes else None


@dataclass(frozen=True)
class WeightFile:
    """A checkpoint's tensors under the names that the file gives them.

    Args:
        source: the file or folder.
        tensors: memory-mapped.
        metadata: of a safetensors or GGUF header.
    """

    source: str
    tensors: Mapping[str, torch.Tensor | QuantizedTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> WeightFile:
    """Read a weight file; or a folder that holds one, or the index of one, in any number of shards.

    Raises:
        FileNotFoundError: there is nothing, or a shard is missing.
        ValueError: the file is of no format that is read here, is cut off, or holds anything but tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.name.endswith(".json"):
        return _read_shards(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{" and not start.startswith(b"GGUF"):
        return _read_safetensors(path)
    for sign, read in _READERS.items():
        if start.startswith(sign):
            return read(path)
    for sign, what in _MISTAKEN.items():
        if start.lstrip().lower().startswith(sign):
            raise ValueError(f"{path} holds no weights: it is {what}")
    raise ValueError(
        f"{path} is neither safetensors, a PyTorch file, nor GGUF; it starts with {start[:16]!r}"
    )


def _read_folder(folder: Path) -> WeightFile:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) != 1):
        found = ", ".join(path.name for path in indices or files) or "none"
        raise FileNotFoundError(
            f"{folder} must hold one safetensors file, or one index of shards; found: {found}"
        )
    return _read_shards(indices[0]) if indices else read_weights(files[0])


def shards_of(index: Path) -> dict[str, str]:
    """Return which file holds each tensor, as the index of shards says.

    Raises:
        ValueError: the file is no such index.
    """
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of weight files: it has no weight_map") from error


def _read_shards(index: Path) -> WeightFile:
    places, folder = shards_of(index), index.parent
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} has {len(names) - len(missing)} of {len(names)} shards; missing: {', '.join(missing)}"
        )
    shards = {name: read_weights(folder / name).tensors for name in names}
    if lost := sorted(key for key, name in places.items() if key not in shards[name]):
        raise ValueError(f"{index} names {lost[0]}, which is not in {places[lost[0]]}")
    return WeightFile(
        str(folder), {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    )


def _read_safetensors(path: Path) -> WeightFile:
    header, metadata = _read_header(path)
    try:
        return WeightFile(str(path), load_file(path), metadata)
    except SafetensorError as error:
        needed = max(entry["data_offsets"][1] for entry in header.values())
        raise ValueError(f"{path} is cut off or damaged: {error}; its tensors take {needed} bytes") from error


def _read_pickle(path: Path) -> WeightFile:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python code beside its tensors; it is not run, and so the file is not read"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    while isinstance(state, dict) and len(state) == 1 and isinstance(next(iter(state.values())), dict):
        (state,) = state.values()  # {"state_dict": …}
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, not a table of tensors")
    if others := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path} holds {others[0]!r}, which is no tensor")
    return WeightFile(str(path), state)


def _read_gguf(path: Path) -> WeightFile:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path} is GGUF; to read it: pip install 'wan22[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors: dict[str, torch.Tensor | QuantizedTensor] = {}
    for tensor in reader.tensors:
        # GGUF lists the innermost axis first; more than four axes are kept beside the tensor.
        shape = fields.get(f"comfy.gguf.orig_shape.{tensor.name}", [*reversed(tensor.shape.tolist())])
        try:
            tensors[tensor.name] = _gguf_tensor(tensor, tuple(int(n) for n in shape))
        except ValueError as error:
            raise ValueError(f"{path}: {tensor.name}: {error}") from error
    return WeightFile(str(path), tensors, fields)


def _gguf_tensor(tensor: Any, shape: tuple[int, ...]) -> torch.Tensor | QuantizedTensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map is read-only, and nobody writes into weights
        data = torch.from_numpy(tensor.data)
    kind = tensor.tensor_type.name
    if kind == "BF16":
        data = data.view(torch.bfloat16)
    if kind in ("F64", "F32", "F16", "BF16"):
        return data.reshape(shape)
    return QuantizedTensor(shape, GgufBlocks(kind, shape), {"data": data})


_READERS = {b"GGUF": _read_gguf, b"PK\x03\x04": _read_pickle, b"\x80": _read_pickle}
_MISTAKEN = {
    b"<": "a web page, saved in place of the file",
    b"version https://git-lfs": "a git-lfs pointer to the file; fetch it with git lfs pull",
}
