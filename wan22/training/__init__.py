"""Training of LoRAs and small models: data, objective, loop, and the files that result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data.cache import cache
    from .loop import Result, Training

# Names and their modules, which are imported when a name is asked for: the settings need no torch.
_EXPORTS = {"TrainConfig": ".config", "Training": ".loop", "Result": ".loop", "cache": ".data.cache"}
__all__ = ["Result", "TrainConfig", "Training", "cache"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
