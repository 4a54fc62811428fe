"""One video on several devices, on torch.distributed; attached to a pipeline from outside."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {"Layout": ".mesh", "Parallel": ".attach", "parallelize": ".attach"}

__all__ = ["Layout", "Parallel", "parallelize"]

if TYPE_CHECKING:
    from .attach import Parallel, parallelize
    from .mesh import Layout


def __getattr__(name: str) -> Any:
    # Loaded on first use, as the command line asks for the rank before anything else.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
