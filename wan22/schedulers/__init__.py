"""Flow-matching schedulers: one schedule, one solver per file, loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dpmpp import FlowMatchDPMSolverScheduler
    from .euler import FlowMatchEulerScheduler
    from .flow_match import FlowMatchScheduler
    from .unipc import FlowMatchUniPCScheduler

__all__ = [
    "FlowMatchDPMSolverScheduler",
    "FlowMatchEulerScheduler",
    "FlowMatchScheduler",
    "FlowMatchUniPCScheduler",
]


def __getattr__(name: str) -> Any:
    modules = {
        "FlowMatchUniPCScheduler": "unipc",
        "FlowMatchDPMSolverScheduler": "dpmpp",
        "FlowMatchEulerScheduler": "euler",
        "FlowMatchScheduler": "flow_match",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{modules[name]}"), name)


def __dir__() -> list[str]:
    return __all__
