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
    "scheduler_class_for",
]


def scheduler_class_for(diffusers_class_name: str) -> "type[FlowMatchScheduler]":
    """Find the class of this package that stands for a diffusers scheduler.

    Args:
        diffusers_class_name: the name in model_index.json or in a config's `_class_name`, such as
            "UniPCMultistepScheduler".

    Returns: the class with the same solver.

    Raises:
        ValueError: diffusers' class has no counterpart here.
    """
    for name in ("FlowMatchUniPCScheduler", "FlowMatchDPMSolverScheduler", "FlowMatchEulerScheduler"):
        scheduler_class: type[FlowMatchScheduler] = __getattr__(name)
        if diffusers_class_name == scheduler_class.schema.class_name:
            return scheduler_class
    from .hub_config import SCHEMAS

    supported = ", ".join(schema.class_name for schema in SCHEMAS)
    raise ValueError(
        f"{diffusers_class_name!r} has no flow-matching counterpart here; supported: {supported}"
    )


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
