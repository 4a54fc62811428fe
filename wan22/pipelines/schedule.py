"""Setting the schedule of any flow-matching scheduler, ours or diffusers'."""

from collections.abc import Sequence
from typing import Any

import numpy as np
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

    Raises:
        ValueError: a schedule that contradicts itself, or that the scheduler cannot follow.
    """
    if shift is not None and (isinstance(shift, bool) or not isinstance(shift, (int, float))):
        raise ValueError(f"flow_shift={shift!r} must be a number above 0, such as 5.0")
    lists = {"sigmas": sigmas, "timesteps": timesteps}
    custom: dict[str, Any] = {name: values for name, values in lists.items() if values is not None}
    if isinstance(scheduler, FlowMatchScheduler):
        scheduler.set_timesteps(steps, device, shift=shift, **custom)
    elif not _is_flow_matching(scheduler):
        settings = "prediction_type='flow_prediction', use_flow_sigmas=True"
        raise ValueError(f"{type(scheduler).__name__} is not set to flow matching; build it with {settings}")
    elif custom:
        if len(custom) > 1 or shift is not None or steps is not None:
            rule = "leave num_inference_steps and flow_shift out"
            raise ValueError(f"sigmas or timesteps, one of them, are the whole schedule; {rule}")
        scheduler = _custom_schedule_of_diffusers(scheduler, device, *custom.popitem())
    else:
        scheduler = scheduler if shift is None else reshifted(scheduler, shift)
        scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    return scheduler


def _is_flow_matching(scheduler: Any) -> bool:
    config = scheduler.config
    by_settings = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    return type(scheduler).__name__.startswith("FlowMatch") or bool(by_settings)


def _custom_schedule_of_diffusers(
    scheduler: Any, device: torch.device, name: str, values: Sequence[float]
) -> Any:
    """Return a diffusers scheduler whose schedule is the given one, or refuse a class without such."""
    scheduler = reshifted(scheduler, 1.0)  # diffusers shifts the given values, too
    levels = np.asarray(values) / (scheduler.config.num_train_timesteps if name == "timesteps" else 1)
    try:
        scheduler.set_timesteps(device=device, **{name: np.asarray(values)})
        taken = np.allclose(scheduler.sigmas[:-1].cpu().numpy(), levels, rtol=0, atol=1e-4)
    except TypeError:  # not an argument of this class, or not one for flow matching
        taken = False
    if not taken:
        class_name = type(scheduler).__name__
        raise ValueError(f"{class_name} takes no {name} as they are; those of wan22.schedulers do")
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
