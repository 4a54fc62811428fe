"""Read PyTorch's own files, without running the code that may be in them."""

import errno
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checks import shown


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors, memory-mapped unless it has the format from before PyTorch 1.6."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python code beside its tensors; it is not run, and so the file is not read"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        if os.strerror(errno.ENOMEM) in str(error):
            raise MemoryError(
                f"{path} has {path.stat().st_size / 1e9:.1f} GB, and PyTorch does not map a file of its own "
                "format that is larger than the host's memory; a file in safetensors may be larger"
            ) from error
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    return tensors_in(state, str(path))


def tensors_in(state: Any, source: str) -> dict[str, torch.Tensor]:
    """Return the tensors of what was saved, which may be in another table; `source` is it, for errors."""
    while isinstance(state, Mapping) and len(state) == 1 and isinstance(next(iter(state.values())), Mapping):
        (state,) = state.values()  # {"state_dict": …}
    if not isinstance(state, Mapping) or not state:
        what = f"a {type(state).__name__}, not a table of tensors" if state else "no tensors"
        raise ValueError(f"{source} holds {what}")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            raise ValueError(f"{source} holds {shown(str(key)[:100])}, which is no tensor")
    return dict(state)
