"""What every guidance formula is, and plain classifier-free guidance.

Shapes: c latent channels, t h w latent frames, rows, columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ....accel.planning.passes import PassKind
from ....models.attention_guidance import AttentionGuidance
from ..experts import Step

# What each pass predicts for one video, "1 c t h w" float32, by the passes' names.
Predictions = Mapping[str, torch.Tensor]
# What a formula keeps of one video from step to step: made anew for each call, each expert, and each size.
Memory = dict[str, Any]


class PassSettings(NamedTuple):
    """What a pass runs with."""

    negative: bool = False  # whether the negative prompt takes the prompt's place
    skip_layers: tuple[int, ...] = ()
    attention: AttentionGuidance | None = None  # how cross-attention keeps away from the negative prompt

    @property
    def kind(self) -> PassKind:
        """What a plan has to know of the pass."""
        return PassKind(self.skip_layers, self.attention)

    @property
    def needs_negative(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.negative or self.attention is not None


UNGUIDED: Mapping[str, PassSettings] = {"cond": PassSettings()}
GUIDED: Mapping[str, PassSettings] = {**UNGUIDED, "uncond": PassSettings(negative=True)}


class Guider:
    """A guidance formula and its settings, without state; subclasses are frozen dataclasses.

    What a call gives it are predictions c, with the prompt, and u, with the negative one, and a scale g. At a
    scale of 1 each formula gives c, and no pass for u runs.
    """

    name: ClassVar[str] = ""  # in `guidance=`, in recipes, on the command line

    @property
    def own_scale(self) -> float | None:
        """The scale that it runs at; None: the call's."""
        return None

    def check(self, models: Sequence[Any]) -> None:
        """Refuse, with a ValueError, transformers that cannot run its passes."""

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return the passes that a step needs, by name; without any its velocity is zero.

        `since`: steps since c and u were last predicted together, by this expert at this size; None: not yet.
        """
        return UNGUIDED if scale == 1 else GUIDED

    def combine(self, predicted: Predictions, scale: float, step: Step, memory: Memory) -> torch.Tensor:
        """Return one video's velocity, "1 c t h w" float32; `memory` is what is kept of this video."""
        cond, uncond = predicted["cond"], predicted.get("uncond")
        return cond if uncond is None else self.guided(cond, uncond, scale, memory)

    def guided(self, c: torch.Tensor, u: torch.Tensor, g: float, memory: Memory) -> torch.Tensor:
        """Return the velocity, given both predictions: by plain guidance, u + g (c - u)."""
        return u + g * (c - u)


@dataclass(frozen=True)
class ClassifierFreeGuidance(Guider):
    """Plain classifier-free guidance: v = u + g (c - u).

    Source: Wan2.2 wan/text2video.py, WanT2V.generate.
    """

    name = "cfg"


def first_step(share: float, count: int) -> int:
    """Return the index of the first step after a share of a schedule's steps, rounded to whole steps."""
    return round(share * count)
