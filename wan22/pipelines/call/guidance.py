"""How the predictions of a step, with the prompt and with the negative one, become one velocity."""

from dataclasses import dataclass
from typing import Protocol

import torch

from .experts import Step


class Guidance(Protocol):
    """A guidance formula; it keeps no state between calls of the pipeline."""

    def needs_negative(self, step: Step) -> bool:
        """Whether a step needs the prediction for the negative prompt."""
        ...

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the velocity, "1 c t h w" float32, given both predictions in the same form."""
        ...


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance with a scale for each expert.

    Source: Wan2.2 wan/text2video.py, WanT2V.generate.
    """

    scale: float  # high-noise expert's, or the only transformer's; 1 turns guidance off
    scale_2: float  # low-noise expert's

    def scale_at(self, step: Step) -> float:
        """Return the scale of a step's expert."""
        return self.scale if step.expert.slot == "transformer" else self.scale_2

    def needs_negative(self, step: Step) -> bool:
        """Whether the scale of the step's expert is not 1."""
        return self.scale_at(step) != 1

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, step: Step) -> torch.Tensor:
        """Return negative + scale * (positive - negative)."""
        return negative + self.scale_at(step) * (positive - negative)
