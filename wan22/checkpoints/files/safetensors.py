"""Read safetensors: the header, the dtypes, the tensors."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        except ValueError as error:
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
        return load_file(path), metadata
    except SafetensorError as error:
        needed = max(entry["data_offsets"][1] for entry in header.values())
        raise ValueError(f"{path} is cut off or damaged: {error}; its tensors take {needed} bytes") from error
