"""One video on many devices, on torch.distributed; what runs there knows nothing of that."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {"Layout": ".mesh", "Parallel": ".attach", "parallelize": ".attach"}

__all__ = ["Layout", "Parallel", "parallelize"]

if TYPE_CHECKING:
    from .attach import Parallel, parallelize
    from .mesh import Layout


def __getattr__(name: str) -> Any:
    # When they are first used: whoever only asks if there are ranks waits for no library.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
