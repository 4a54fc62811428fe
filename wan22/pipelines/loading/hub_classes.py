"""Our classes under the names that model_index.json gives them.

diffusers imports the module that model_index.json names for each component and takes the class from there;
`LoadablePipeline.load_config` makes it read "diffusers" as this module.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ...checks import cut, shown
from ...schedulers import FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler, FlowMatchUniPCScheduler
from ...schedulers.hub_config import written_here

logger = logging.getLogger(__name__)

# The two mixins are how diffusers tells models from schedulers.
__all__ = [
    "AutoencoderKLWan",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "ModelMixin",
    "SchedulerMixin",
    "UniPCMultistepScheduler",
    "WanTransformer3DModel",
]


class _SavedScheduler(SchedulerMixin):
    """Loads a scheduler's config by the class that it was saved by, ours or diffusers'."""

    ours: Any

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """Load the scheduler; diffusers' own where ours lacks one of its settings."""
        config = cls.ours.load_config(path, subfolder=options.get("subfolder"))
        # What the hub's Wan repositories hold is UniPC, written by diffusers for the official one.
        official = cls.ours is FlowMatchUniPCScheduler or written_here(config)
        return (cls.ours if official else getattr(diffusers, cls.__name__)).from_pretrained(path, **options)


class UniPCMultistepScheduler(_SavedScheduler):
    """UniPC: ours."""

    ours = FlowMatchUniPCScheduler


class DPMSolverMultistepScheduler(_SavedScheduler):
    """DPM-Solver++: ours if we wrote the config."""

    ours = FlowMatchDPMSolverScheduler


class FlowMatchEulerDiscreteScheduler(_SavedScheduler):
    """Euler's method: ours if we wrote the config."""

    ours = FlowMatchEulerScheduler


def saved_scheduler(scheduler: Any) -> tuple[list[str] | None, list[str] | None]:
    """Return what model_index.json says of a scheduler: an entry that diffusers loads, and the class itself.

    The entry is None for a class that derives from none of diffusers' or ours: it stays as diffusers writes
    it. The second is None where the entry says it all; of diffusers' UniPC it does not, as it becomes ours.
    """
    own = type(scheduler)
    for cls in own.mro():
        ours = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
        name = cls.schema.class_name if ours else cls.__name__  # type: ignore[attr-defined]
        if ours or (cls is not SchedulerMixin and getattr(diffusers, name, None) is cls):
            told = cls is own is not diffusers.UniPCMultistepScheduler
            return ["diffusers", name], None if told else [own.__module__, own.__qualname__]
    return None, None


def load_own_scheduler(entry: Sequence[str], folder: Path) -> Any:
    """Load a scheduler by the caller's own class; None, with a warning, where the class is not here.

    It is taken from the modules that are imported already; what is no scheduler there is refused by a
    ValueError.
    """
    if not (isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        raise ValueError(
            f"{cut(folder.parent)} names the scheduler's class {shown(entry)}, not [module, name]"
        )
    module, name = entry
    try:
        cls = getattr(sys.modules[module], name)  # nothing is imported because a file names it
    except (KeyError, AttributeError):
        message = "the scheduler was a %s of %s, which is not here; import it first, or another one runs: %s"
        logger.warning(message, cut(name), cut(module), "the class that it derives from")
        return None
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        where = f"{cut(folder.parent)} names {cut(module)}.{cut(name)} as the scheduler's class"
        raise ValueError(f"{where}, which is none of diffusers' SchedulerMixin; give scheduler=")
    return cls.from_pretrained(folder)  # type: ignore[attr-defined]
