"""The two transformer slots, which one serves a timestep, and the steps of a schedule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...few_steps import SLOTS, FewSteps


@dataclass(frozen=True)
class Expert:
    """One transformer of a pipeline: the one that is in its slot when it is used, as in diffusers.

    Between the steps of a call, a callback may replace it, or free one that has done its work.
    """

    pipe: Any
    slot: str  # the pipeline's component, "transformer" or "transformer_2"
    label: str  # "high noise", "low noise", or "" for the only transformer

    @property
    def model(self) -> Any:
        """The transformer; None if it is not loaded."""
        return getattr(self.pipe, self.slot)

    def check_loaded(self, timestep: float | torch.Tensor) -> None:
        """Refuse a timestep in 0 to 1000 for which there is no model, by a ValueError."""
        if self.model is None:
            served_by = f"the {self.label or 'only'} expert, but pipe.{self.slot} is None"
            raise ValueError(
                f"timestep {float(timestep):g} is served by {served_by}; load it, or choose timesteps that "
                "the other expert serves"
            )


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a schedule."""

    index: int  # from 0
    count: int  # steps of the schedule
    timestep: torch.Tensor  # scalar, 0 to 1000, as the scheduler has it
    sigma: float  # noise level, 0 to 1
    expert: Expert
    next_expert: Expert | None  # the next step's, if that is another one
    lora_scales: Mapping[str, float] | None = None  # factors of adapters' strengths in it, by their names
    size: tuple[int, int] | None = None  # width and height in pixels, where they change in the schedule

    @property
    def stage(self) -> tuple[Expert, tuple[int, int] | None]:
        """What predictions of earlier steps must share to be of use: the expert, and the size."""
        return self.expert, self.size

    @property
    def number(self) -> int:
        """Number of the step, from 1."""
        return self.index + 1

    @property
    def is_last(self) -> bool:
        """Whether the schedule ends with it."""
        return self.number == self.count


# Given a step's expert and its timestep, it returns the factors of adapters' strengths, by their names.
LoraScales = Callable[[Expert, float], Mapping[str, float]]


class Experts:
    """Chooses the transformer of each timestep; `boundary` is the lowest one of the high-noise expert.

    With one transformer, the boundary is None. Settings of a distilled model may choose otherwise.

    Source: Wan2.2 wan/text2video.py, WanT2V.generate.
    """

    def __init__(self, pipe: Any, boundary: float | None, few_steps: FewSteps | None = None) -> None:
        labels = ("", "") if boundary is None else ("high noise", "low noise")
        self.boundary, self.few_steps = boundary, few_steps
        self.high = Expert(pipe, "transformer", labels[0])
        self.low = Expert(pipe, "transformer_2", labels[1])

    def serving(self, timestep: float) -> Expert:
        """Return the expert of a timestep in 0 to 1000; a ValueError says if it is not loaded."""
        slot = None if self.few_steps is None else self.few_steps.phase_of(timestep).expert
        if slot is None:
            slot = SLOTS[0] if self.boundary is None or timestep >= self.boundary else SLOTS[1]
        expert = self.high if slot == SLOTS[0] else self.low
        expert.check_loaded(timestep)
        return expert

    def steps(self, scheduler: Any, lora_scales: LoraScales | None = None) -> list[Step]:
        """Return the steps of a scheduler whose schedule is set; a missing expert is refused by name."""
        timesteps, sigmas = scheduler.timesteps, scheduler.sigmas.tolist()
        experts = [self.serving(timestep) for timestep in timesteps.tolist()]
        followers = [*experts[1:], experts[-1]]
        return [
            Step(
                *(i, len(experts), timesteps[i], sigmas[i], expert),
                next_expert=followers[i] if followers[i] != expert else None,
                lora_scales=lora_scales(expert, timesteps[i].item()) if lora_scales is not None else None,
            )
            for i, expert in enumerate(experts)
        ]
