"""Read weight files: safetensors in one file or in shards, PyTorch's .pth, GGUF.

A file's format is recognised by its first bytes, never by its name. Tensors stay memory-mapped: reading a
checkpoint costs no memory before its weights are used.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...checks import cut
from .gguf import gguf_tensor, read_gguf
from .pth import read_pth, tensors_in
from .quantized import QuantizedTensor
from .safetensors import read_safetensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # of weights, in whatever format
_MISTAKEN = {
    b"<": "a web page, saved in place of the file",
    b"version https://git-lfs": "a git-lfs pointer to the file; fetch it with git lfs pull",
}


@dataclass(frozen=True)
class WeightFile:
    """A checkpoint's tensors under the file's names, memory-mapped, and its header's metadata."""

    source: str
    tensors: Mapping[str, torch.Tensor | QuantizedTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()  # the files that hold the tensors; none for a table of them
    flat: bool = False  # whether axes may be merged, or left out if they have one entry, as in GGUF


def read_weights(path: Path) -> WeightFile:
    """Read a weight file, an index of shards, or a folder that holds one of either.

    A missing file or shard is a FileNotFoundError, another format or a file that is cut off a ValueError.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.name.endswith(".json"):
        return _read_shards(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"GGUF"):
        return WeightFile(str(path), *read_gguf(path), (path,), flat=True)
    if start[8:9] == b"{":
        return WeightFile(str(path), *read_safetensors(path), (path,))
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return WeightFile(str(path), read_pth(path), paths=(path,))
    for sign, what in _MISTAKEN.items():
        if start.lstrip().lower().startswith(sign):
            raise ValueError(f"{path} holds no weights: it is {what}")
    raise ValueError(f"{path} is neither safetensors, a PyTorch file, nor GGUF")


def weights_of(table: Mapping[str, Any]) -> WeightFile:
    """Return a table of tensors, as from a file; diffusers' tensors of GGUF keep their blocks."""
    source = "the table of tensors"
    return WeightFile(source, {name: _plain(tensor) for name, tensor in tensors_in(table, source).items()})


def _plain(tensor: Any) -> torch.Tensor | QuantizedTensor:
    if not hasattr(tensor, "quant_type"):
        return tensor.detach()
    # diffusers' GGUFParameter, of which nearly every method returns another one
    return gguf_tensor(tensor.as_tensor(), tensor.quant_type.name, tuple(tensor.quant_shape))


def _read_folder(folder: Path) -> WeightFile:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) != 1):
        found = ", ".join(path.name for path in indices or files) or "none"
        raise FileNotFoundError(
            f"{folder} must hold one safetensors file, or one index of shards; found: {found}"
        )
    return _read_shards(indices[0]) if indices else read_weights(files[0])


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's contents; {} if there is no such file. A ValueError: it is no table in JSON."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte-order mark first
    except (ValueError, RecursionError) as error:
        what = "is empty" if not path.stat().st_size else f"is not JSON: {str(error)[:200]}"
        raise ValueError(f"{path} {what}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table")
    return content


def as_json(value: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"


def shards_of(index: Path) -> dict[str, str]:
    """Return the name of the file that holds each tensor, as an index of shards says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is no index of weight files: it has no weight_map")
    if outside := [name for name in places.values() if Path(name).name != name or name.endswith(".json")]:
        raise ValueError(f"{index} names {outside[0][:100]!r}, which is no weight file beside it")
    return places


def check_places(index: Path, places: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> None:
    """Refuse an index that names a tensor which its shard does not hold, and a tensor in two shards."""
    found: dict[str, str] = {}
    for name, keys in held.items():
        for key in keys:
            if key in found:
                raise ValueError(
                    f"{index.parent} has {cut(key)} twice, in {cut(found[key])} and in {cut(name)}"
                )
            found[key] = name
    if lost := sorted(key for key, name in places.items() if found.get(key) != name):
        raise ValueError(f"{index} names {cut(lost[0])}, which is not in {cut(places[lost[0]])}")


def _read_shards(index: Path) -> WeightFile:
    places, folder = shards_of(index), index.parent
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} has {len(names) - len(missing)} of {len(names)} shards; missing: {', '.join(missing)}"
        )
    shards = {name: read_weights(folder / name).tensors for name in names}
    check_places(index, places, shards)
    tensors = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    return WeightFile(str(folder), tensors, paths=tuple(folder / name for name in names))


def weight_files(path: Path) -> list[Path]:
    """Return the weight files that a path names: itself, or those of the folder, in order."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
