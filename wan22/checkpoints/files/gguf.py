"""Read GGUF: plain tensors, and blocks that stay quantised."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from .quantized import GgufBlocks, QuantizedTensor


def read_gguf(path: Path) -> tuple[dict[str, torch.Tensor | QuantizedTensor], dict[str, Any]]:
    """Return a file's tensors, memory-mapped, and its metadata.

    Without the package gguf there is an ImportError; a ValueError names a type of blocks that cannot be read.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path} is GGUF; to read it: pip install 'wan22[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is cut off or damaged: {str(error)[:200]}") from error
    _check_places(path, reader)
    tensors: dict[str, torch.Tensor | QuantizedTensor] = {}
    for tensor in reader.tensors:
        # GGUF lists the innermost axis first; more than four axes are kept beside the tensor.
        shape = fields.get(f"comfy.gguf.orig_shape.{tensor.name}", [*reversed(tensor.shape.tolist())])
        try:
            if not isinstance(shape, list) or math.prod(map(int, shape)) != tensor.n_elements:
                raise ValueError(f"its shape, {str(shape)[:80]}, is not that of {tensor.n_elements} values")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the map is read-only, as weights are used
                data = torch.from_numpy(tensor.data)
            kind = tensor.tensor_type.name
            tensors[tensor.name] = gguf_tensor(data, kind, tuple(int(n) for n in shape))
        except ValueError as error:
            raise ValueError(f"{path}: {tensor.name}: {error}") from error
    return tensors, fields


def _check_places(path: Path, reader: Any) -> None:
    """Refuse a file whose tensors overlap each other or its header."""
    end, before = int(reader.data_offset), "the header"
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        if int(tensor.data_offset) < end:
            raise ValueError(f"{path} is damaged: {tensor.name} overlaps {before}")
        end, before = int(tensor.data_offset) + int(tensor.n_bytes), tensor.name


def gguf_tensor(data: torch.Tensor, kind: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedTensor:
    """Return the tensor whose values have a shape; `kind` is GGUF's name of the type of what is stored."""
    if kind == "BF16":
        data = data.view(torch.bfloat16)
    if kind in ("F64", "F32", "F16", "BF16"):
        return data.reshape(shape)
    return QuantizedTensor(shape, GgufBlocks(kind, shape), {"data": data})
