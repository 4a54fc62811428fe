"""Read GGUF: plain tensors, and blocks that stay quantised."""

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
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors: dict[str, torch.Tensor | QuantizedTensor] = {}
    for tensor in reader.tensors:
        # GGUF lists the innermost axis first; more than four axes are kept beside the tensor.
        shape = fields.get(f"comfy.gguf.orig_shape.{tensor.name}", [*reversed(tensor.shape.tolist())])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the map is read-only, as weights are used
                data = torch.from_numpy(tensor.data)
            kind = tensor.tensor_type.name
            tensors[tensor.name] = gguf_tensor(data, kind, tuple(int(n) for n in shape))
        except ValueError as error:
            raise ValueError(f"{path}: {tensor.name}: {error}") from error
    return tensors, fields


def gguf_tensor(data: torch.Tensor, kind: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedTensor:
    """Return the tensor whose values have a shape; `kind` is GGUF's name of the type of what is stored."""
    if kind == "BF16":
        data = data.view(torch.bfloat16)
    if kind in ("F64", "F32", "F16", "BF16"):
        return data.reshape(shape)
    return QuantizedTensor(shape, GgufBlocks(kind, shape), {"data": data})
