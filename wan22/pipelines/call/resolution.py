"""Fewer tokens for a while: parts of a schedule run at smaller sizes.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns. Sizes are (width, height) in pixels.
"""

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...checks import check_choice, check_real, shown
from ...schedulers.flow_match import x0_from_velocity
from .conditions import Condition
from .experts import Step
from .guidance.guider import first_step
from .request import Request
from .schedule import scheduler_shift, set_schedule

Size = tuple[int, int]
# A scale of both sides, and the share of the steps at which the next part begins; the last is at full size.
ResolutionSchedule = tuple[tuple[float, float], ...]

SCHEDULES: Mapping[str, ResolutionSchedule] = {
    "coarse-to-fine": ((0.75, 0.5),),
    "u": ((1.0, 0.25), (0.75, 0.875)),
}
SMALLEST = 0.25  # scale: a sixteenth of the tokens, of which little is left to see
MOST_PARTS = 100


@dataclass(frozen=True)
class Part:
    """A part of a schedule at one size."""

    size: Size
    until: float  # share of the schedule's steps at which the next one begins


def read_resolution_schedule(value: Any) -> ResolutionSchedule | None:
    """Return the scale of each part and the share of the steps at which it ends.

    Args:
        value: pairs, also as JSON; a name among SCHEDULES; None.

    Raises: ValueError: there is no such name, a scale or a share is out of its range, or shares do not rise.
    """
    if value is None:
        return None
    name = "resolution_schedule"
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}={shown(value)} must be a name, or JSON: {error}") from None
    if isinstance(value, str):
        check_choice(name, value, tuple(SCHEDULES))
        return SCHEDULES[value]
    if not _is_list(value) or not 1 <= len(value) <= MOST_PARTS:
        raise ValueError(f"{name}={shown(value)} must be pairs (scale, until), such as [(0.75, 0.5)]")
    parts: list[tuple[float, float]] = []
    for i, pair in enumerate(value):
        if not _is_list(pair) or len(pair) != 2:
            raise ValueError(f"{name}[{i}]={shown(pair)} must be a pair (scale, until), such as (0.75, 0.5)")
        scale = check_real(f"{name}[{i}][0]", pair[0], SMALLEST, 1, hint="a scale of both sides")
        until = check_real(
            f"{name}[{i}][1]", pair[1], 0, 1, above=True, hint="the share of the steps at which it ends"
        )
        if until == 1:
            raise ValueError(f"{name}[{i}][1]=1 leaves no step at full size; the last part must end before")
        if parts and until <= parts[-1][1]:
            raise ValueError(f"{name}[{i}][1]={shown(until)} must lie above {parts[-1][1]:g}: shares rise")
        parts.append((scale, until))
    return tuple(parts)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def checked_parts(pipe: Any, request: Request, size: Size) -> tuple[Part, ...]:
    """Return the parts of a call's schedule, the last one at full size; none if they have all one size.

    Sides are the nearest ones of whole tokens.

    Raises: ValueError: a side is less than a token, or something of the call does not go together with it.
    """
    pairs = read_resolution_schedule(request.resolution_schedule)
    if pairs is None:
        return ()
    if request.distilled is not None:
        raise ValueError(
            "resolution_schedule= and distilled=: each of so few steps counts; leave one of them out"
        )
    for other in ("sigmas", "timesteps"):
        if getattr(request, other) is not None:
            raise ValueError(
                f"resolution_schedule= raises the shift, and {other} are used as they are; leave one of "
                "them out"
            )
    if any(getattr(model, "is_cache_enabled", False) for model in pipe.transformers):
        raise ValueError(
            "resolution_schedule= and a step cache of diffusers in the model, which keeps tensors of one "
            "size; call disable_cache(), and use cache="
        )
    _, rows, columns = pipe.any_transformer.config.patch_size
    cell = columns * pipe.vae_scale_factor_spatial, rows * pipe.vae_scale_factor_spatial
    parts: list[Part] = []
    for i, (scale, until) in enumerate((*pairs, (1.0, 1.0))):
        width, height = (int(scale * side / one + 0.5) * one for side, one in zip(size, cell, strict=True))
        what = (
            f"resolution_schedule[{i}][0]={scale:g} of {size[0]}x{size[1]}, in tokens of {cell[0]}x{cell[1]}"
        )
        if not width or not height:
            raise ValueError(f"{what} pixels, is {width}x{height}; give a larger scale")
        if scale < 1 and (width, height) == size:
            raise ValueError(
                f"{what} pixels, is {width}x{height} again; give a smaller scale, or leave it out"
            )
        if parts and parts[-1].size == (width, height):
            parts.pop()
        parts.append(Part((width, height), until))
    return tuple(parts) if len(parts) > 1 else ()


@dataclass(frozen=True)
class Stage:
    """Steps of a schedule at one size, and the solver that takes them, its own schedule set."""

    solver: Any
    start: int  # index of its first step
    end: int  # and of the next stage's
    size: Size
    cells: tuple[int, int]  # rows and columns of the latents


def stages_of(pipe: Any, request: Request, scheduler: Any, parts: Sequence[Part]) -> list[Stage]:
    """Return the stages of a call's schedule, which is set in its scheduler.

    Each stage has steps of a schedule of as many steps as the call's, at a shift raised by 1 at each switch:
    more tokens want more noise for as much of a video to be undecided.

    Raises: ValueError: a part has no step, or the schedule has no shift or two timesteps a step.
    """
    if not parts:
        return []
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    if scheduler.num_inference_steps != count:
        raise ValueError(
            f"resolution_schedule= is for solvers that run the model once a step, and {name} does so twice"
        )
    shift = scheduler_shift(scheduler) if request.flow_shift is None else request.flow_shift
    if shift is None:
        raise ValueError(f"resolution_schedule= raises the shift of the schedule, and {name} has none")
    stages: list[Stage] = []
    start = 0
    for raised, part in enumerate(parts):
        end = first_step(part.until, count)
        width, height = part.size
        if end <= start:
            raise ValueError(
                f"resolution_schedule: the part at {width}x{height} until {part.until:g} has none of the "
                f"{count} steps; give more steps, or other shares"
            )
        # A copy: another call may step the pipeline's own, and each stage has a history of its own.
        solver, device = copy.deepcopy(scheduler), scheduler.timesteps.device
        if raised:
            solver = set_schedule(solver, device, count, shift + raised, None, None)
            solver.set_begin_index(start)
        stages.append(Stage(solver, start, end, part.size, pipe.latent_shape(1, height, width)[2:]))
        start = end
    return stages


class SizedSolver:
    """Takes the steps of several stages; in place of the last step of each, the latents change their size.

    There the clean latents that the step predicts, x - sigma v, are resized, and noised to the level s of the
    next stage's first step: (1 - s) x0 + s e, with fresh noise e. What solvers keep of earlier steps is of
    another size: each stage has a solver that begins anew, with a step of order 1.

    Source: ModelTC/LightX2V, lightx2v/models/schedulers/wan/changing_resolution. There the level of the noise
    is that of the step before, and the model is asked for the next one's; here both are the next one's.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.timesteps = torch.cat([each.solver.timesteps[each.start : each.end] for each in stages])
        levels = [each.solver.sigmas[each.start : each.end] for each in stages]
        self.sigmas = torch.cat([*levels, stages[-1].solver.sigmas[-1:]])
        self._index = 0

    def sized(self, steps: Sequence[Step]) -> list[Step]:
        """Return the steps with the sizes of their stages."""
        sizes = [each.size for each in self.stages for _ in range(each.start, each.end)]
        return [replace(step, size=size) for step, size in zip(steps, sizes, strict=True)]

    def step(
        self, velocity: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """Return latents "b c t h w" after the next step, float32, of the size of the one after it."""
        index, self._index = self._index, self._index + 1
        at = next(i for i, stage in enumerate(self.stages) if index < stage.end)
        stage = self.stages[at]
        if index + 1 < stage.end or stage is self.stages[-1]:
            return stage.solver.step(velocity, timestep, sample, return_dict=False)
        clean = x0_from_velocity(sample, velocity, self.sigmas[index])
        clean, level = resized(clean, self.stages[at + 1].cells), self.sigmas[index + 1]
        # Of the videos' own generators, see NoisePerVideo.
        noise = torch.randn_like(clean)
        return ((1 - level) * clean + level * noise,)


def resized(latents: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """Return latents "b c t h w" with other rows and columns, interpolated linearly; or as they are."""
    if tuple(latents.shape[3:]) == tuple(cells):
        return latents
    return F.interpolate(latents, (latents.shape[2], *cells), mode="trilinear")


@dataclass(frozen=True)
class ConditionBySize:
    """The conditions of a call whose latents change their size, by the latents' rows and columns."""

    conditions: Mapping[tuple[int, int], Condition]

    def _of(self, latents: torch.Tensor) -> Condition:
        return self.conditions[latents.shape[3], latents.shape[4]]

    def model_inputs(self, video: int, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments for one video's latents "1 c t h w" and a timestep "1"."""
        return self._of(latents).model_inputs(video, latents, timestep)

    def overwrite_known_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents "b c t h w" with the given frames in place."""
        return self._of(latents).overwrite_known_frames(latents)


def sizes_of(steps: Sequence[Step]) -> tuple[tuple[int, int, int], ...]:
    """Return width, height and number of steps of each part of a schedule; () where the size stays."""
    runs = itertools.groupby(step.size for step in steps)
    return tuple((*size, len(list(run))) for size, run in runs if size is not None)
