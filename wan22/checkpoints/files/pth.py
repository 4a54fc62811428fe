"""Read PyTorch's own files, without running the code that may be in them."""

import pickle
from pathlib import Path

import torch


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
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    while isinstance(state, dict) and len(state) == 1 and isinstance(next(iter(state.values())), dict):
        (state,) = state.values()  # {"state_dict": …}
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, not a table of tensors")
    if others := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path} holds {others[0]!r}, which is no tensor")
    return state
