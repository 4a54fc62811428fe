"""A checked call: its arguments completed with the checkpoint's settings, and all that its run needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...accel.planning.passes import most_of
from ...accel.sparse.settings import SparseAttention
from ...few_steps import FewSteps
from ...video.recipe import Recipe
from .caches.settings import StepCache
from .callback import StepCallback
from .experts import Step
from .guidance.scales import Guidance
from .request import Request
from .resolution import Size
from .state import CallState


@dataclass(frozen=True)
class Call:
    """A checked and completed request."""

    request: Request  # the arguments as they were given
    recipe: Recipe  # every setting, completed
    prompts: Sequence[str | None]  # one per prompt, not per video; None where embeddings were given
    negative_prompts: Sequence[str | None]  # one per prompt, too
    generators: Sequence[torch.Generator]  # one per video: source of all its noise
    state: CallState  # what changes meanwhile; its scheduler's schedule is set
    steps: Sequence[Step]
    guidance: Guidance
    guided: bool  # whether any step needs the negative prompt
    callback: StepCallback | None
    few_steps: FewSteps | None = None  # of a distilled checkpoint or LoRA
    cache: StepCache | None = None
    attention: SparseAttention | None = None
    part: Size | None = None  # width and height of a part of the schedule that this call stands in for

    @property
    def sizes(self) -> list[Size]:
        """Width and height at which steps run, each once, the first step's first."""
        return list(dict.fromkeys(step.size or self.full_size for step in self.steps))

    @property
    def full_size(self) -> Size:
        """The videos' width and height."""
        return self.recipe.width, self.recipe.height

    def at(self, size: Size) -> "Call":
        """Return the call as conditions are made for it, for steps at a size."""
        return replace(self, part=size)

    @property
    def size(self) -> dict[str, Any]:
        """What a plan takes: the videos' sizes and number, a step's passes, and what a cache keeps."""
        recipe = self.recipe
        size = {"height": recipe.height, "width": recipe.width, "num_frames": recipe.num_frames}
        residuals = 0 if self.cache is None else self.cache.residuals
        kept = {"residuals": residuals} if residuals else {}
        passes = most_of(self.guidance.kinds(self.steps))
        return {**size, "videos": len(self.generators), "passes": passes, **kept}
