"""A checked call: its arguments completed with the checkpoint's settings, and all that its run needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...video.recipe import Recipe
from .callback import StepCallback
from .experts import Step
from .guidance import Guidance
from .request import Request


@dataclass(frozen=True)
class Call:
    """A checked and completed request.

    Args:
        request: the arguments as they were given.
        recipe: every setting, completed.
        prompts: one per prompt, not per video; None where embeddings were given.
        negative_prompts: one per prompt; None where embeddings were given.
        generators: one per video: source of all its noise.
        scheduler: solver whose schedule is set.
        steps: steps of the schedule.
        guidance: how a step's predictions become one velocity.
        guided: whether any step needs the negative prompt.
        callback: the caller's function after each step, if any.
    """

    request: Request
    recipe: Recipe
    prompts: Sequence[str | None]
    negative_prompts: Sequence[str | None]
    generators: Sequence[torch.Generator]
    scheduler: Any
    steps: Sequence[Step]
    guidance: Guidance
    guided: bool
    callback: StepCallback | None
