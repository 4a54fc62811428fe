"""What changes while a call runs."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...video.recipe import Recipe

logger = logging.getLogger(__name__)


class CallState:
    """What changes while a call runs; callbacks read and set it as attributes of the pipeline.

    Args:
        scheduler: the solver, no other call's.
        attention_kwargs: as they were given.
        scales_loras: whether LoRAs have other strengths in this call than those they were loaded with.
    """

    def __init__(
        self,
        scheduler: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        scales_loras: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.scales_loras = scales_loras
        self.stepping = threading.Lock()  # held while the scheduler changes
        self.running = False
        self.recipe: Recipe | None = None
        self.guided = False  # whether the negative prompt is encoded
        self.guidance_scale_2: float | None = None
        self.attention_kwargs = attention_kwargs
        self.num_timesteps = 0
        self.current_timestep: torch.Tensor | None = None
        self.interrupt = False  # a callback's wish to end with the latents of the present step
        # By video: passes that were computed, and all that its steps had; with a step cache alone.
        self.passes: dict[int, tuple[int, int]] = {}
        self.skipped_steps = 0  # those that were skipped for all videos
        self.stop = False  # a wish to end with the video as it would become
        self._guidance_scale: float | None = None
        self._first_scale: float | None = None

    def start(self, recipe: Recipe, guided: bool, num_timesteps: int) -> None:
        """Take over a checked call's settings."""
        self.recipe, self.guided, self.num_timesteps = recipe, guided, num_timesteps
        scales = recipe.guidance_scale  # one, or each step's
        self._first_scale = self._guidance_scale = max(scales) if isinstance(scales, list) else scales
        self.guidance_scale_2 = recipe.call.get("guidance_scale_2")
        self.running = True

    def count_passes(self, computed: Sequence[int], skipped: Sequence[int], passes: int) -> None:
        """Count the passes of a step of which a step cache has skipped some videos."""
        for videos, ran in ((computed, passes), (skipped, 0)):
            for video in videos:
                before, of = self.passes.get(video, (0, 0))
                self.passes[video] = before + ran, of + passes
        self.skipped_steps += not computed

    def end(self) -> None:
        """Say that the call is over; what it was stays readable."""
        self.running, self.current_timestep = False, None

    @property
    def guidance_scale(self) -> float | None:
        """The scale of the high-noise expert, the highest where each step has one, or what was set since."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        if self.running and value > 1 and value != self._first_scale:
            if not self.guided:
                raise ValueError(
                    f"guidance_scale={value:g} in a call that began without guidance: its negative prompt is "
                    "not encoded; begin with a guidance_scale above 1"
                )
            if self._guidance_scale == self._first_scale:  # the first change, not each of them
                logger.warning(
                    "guidance_scale=%g in a running call changes nothing, as in diffusers: the scale stays "
                    "%g; 1 or less turns guidance off",
                    *(value, self._first_scale),
                )
        if not self.running:  # a loop of the caller's own, written as in diffusers
            self._first_scale = None
        self._guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether steps are guided: as the call began, or as the sign of a scale that was set since says.

        Source: diffusers, WanPipeline.__call__, where the scale itself is a local variable.
        """
        if self._guidance_scale is None or self._guidance_scale == self._first_scale:
            return self.guided
        return self._guidance_scale > 1


def of_call(name: str, description: str, settable: bool = True) -> Any:
    """Return a property of a pipeline that is one of `CallState`'s attributes.

    Read, it is that of the call that runs in this thread, or else of the latest one. Set in a call's thread,
    by a callback, it is set for this call, and elsewhere for all that run, or else for the latest.
    """

    def get(pipe: Any) -> Any:
        return getattr(pipe.calls.present, name)

    def put(pipe: Any, value: Any) -> None:
        for state in pipe.calls.addressed:
            setattr(state, name, value)

    setter: Callable[[Any, Any], None] | None = put if settable else None
    return property(get, setter, doc=description)
