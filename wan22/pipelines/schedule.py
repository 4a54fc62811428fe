"""Setting the schedule of any flow-matching scheduler, ours or diffusers'."""

from collections.abc import Sequence
from typing import Any

import torch

from ..schedulers import FlowMatchScheduler


def set_schedule(
    scheduler: Any,
    device: torch.device,
    steps: int | None,
    shift: float | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> Any:
    """Set a call's schedule, to be run from its beginning.

    Args:
        scheduler: one of `wan22.schedulers`, or any flow-matching scheduler of diffusers.
        device: where the timesteps are used.
        steps: denoising steps; may be None where sigmas or timesteps are given.
        shift: of the schedule; None keeps the scheduler's.
        sigmas: noise levels to use as they are.
        timesteps: likewise, 0 to 1000.

    Returns: the scheduler with the schedule; a new one where diffusers' has to be built anew for the shift.
    """
    lists = {"sigmas": sigmas, "timesteps": timesteps}
    custom: dict[str, Any] = {name: values for name, values in lists.items() if values is not None}
    if isinstance(scheduler, FlowMatchScheduler):
        scheduler.set_timesteps(steps, device, shift=shift, **custom)
    else:
        if shift is not None:
            scheduler = reshifted(scheduler, shift)
        scheduler.set_timesteps(device=device, **(custom or {"num_inference_steps": steps}))
    scheduler.set_begin_index(0)
    return scheduler


def scheduler_shift(scheduler: Any) -> float | None:
    """Return the shift in a scheduler's config, ours or diffusers'."""
    for name in ("flow_shift", "shift"):
        if name in scheduler.config:
            return float(scheduler.config[name])
    return None


def reshifted(scheduler: Any, shift: float) -> Any:
    """Return a scheduler like the given one with another shift."""
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    return type(scheduler).from_config(scheduler.config, **{name: shift})
