"""The schedule and the steps of any flow-matching scheduler, ours or diffusers'."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...checks import check_positive_int, check_real
from ...schedulers import FlowMatchEulerScheduler, FlowMatchScheduler
from .noise import NoisePerVideo
from .request import Request
from .state import CallState

_FLOW_MATCHING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def scheduler_for(request: Request, scheduler: Any, device: torch.device, default_steps: int) -> Any:
    """Return the scheduler of a call, its schedule set: the pipeline's, or Euler's for distilled models."""
    steps = request.num_inference_steps
    if steps is None and request.sigmas is None and request.timesteps is None:
        steps = default_steps
    if steps is not None:
        check_positive_int("num_inference_steps", steps)
    if request.distilled is not None:
        scheduler = FlowMatchEulerScheduler(stochastic_sampling=request.distilled.stochastic)
    return set_schedule(scheduler, device, steps, request.flow_shift, request.sigmas, request.timesteps)


def take_step(
    state: CallState,
    velocity: torch.Tensor,
    timestep: torch.Tensor,
    latents: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Return the latents after a solver's step; what it draws comes from the videos' own generators."""
    with state.stepping, NoisePerVideo(generators):
        return state.scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def set_schedule(
    scheduler: Any,
    device: torch.device,
    steps: int | None,
    shift: float | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> Any:
    """Set a call's schedule; return the scheduler, a new one where diffusers' has to be built anew.

    Args:
        scheduler: one of `wan22.schedulers`, or any flow-matching scheduler of diffusers.
        device: device of the timesteps.
        steps: denoising steps; None only with sigmas or timesteps.
        shift: None keeps the scheduler's.
        sigmas: noise levels to use as they are, 0 to 1.
        timesteps: timesteps to use as they are, 0 to 1000.
    """
    if shift is not None:
        shift = check_real("flow_shift", shift, 0, above=True, hint="such as 5.0")
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
    config, cls = scheduler.config, type(scheduler)
    said = [config[name] == value for name, value in _FLOW_MATCHING.items() if name in config]
    # Without such settings a class of diffusers tells by its name, and one of the caller's own is believed.
    unsaid = cls.__name__.startswith("FlowMatch") or not cls.__module__.startswith("diffusers.")
    return unsaid if not said else all(said) or cls.__name__.startswith("FlowMatch")


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
    """Return a scheduler's shift, ours or diffusers'."""
    # diffusers' set_shift leaves the config as it is.
    if hasattr(type(scheduler), "shift"):
        return float(scheduler.shift)
    for name in ("flow_shift", "shift"):
        if name in scheduler.config:
            return float(scheduler.config[name])
    return None


def changed_by_hand(scheduler: Any) -> str | None:
    """Return what has changed a scheduler so that no config gives its levels again; None if nothing has."""
    if not hasattr(type(scheduler), "shift") or scheduler.shift == scheduler.config.get("shift"):
        return None
    return f"set_shift({scheduler.shift:g}) has changed the scheduler"


def reshifted(scheduler: Any, shift: float) -> Any:
    """Return a scheduler like the given one with another shift."""
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    return type(scheduler).from_config(scheduler.config, **{name: shift})
