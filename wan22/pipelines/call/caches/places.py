"""Where in the work of its expert a step lies."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..experts import Step


@dataclass(frozen=True)
class Place:
    """A step among those that its expert takes one after the other."""

    slot: str  # the pipeline's component, "transformer" or "transformer_2"
    index: int  # from 0
    count: int  # steps of the expert
    is_last: bool  # whether the schedule ends with it
    begins: bool  # whether nothing is known yet: it is the first one of its expert, or at its size

    def may_be_skipped(self, warmup: float) -> bool:
        """Whether it is not the first step of the expert or a size, the last, or in the warm-up share."""
        # A share such as 0.6 of 10 steps is 6 of them, though its product is a little less in binary.
        exact = math.floor(warmup * self.count + 1e-9)
        return self.index >= exact and not self.begins and not self.is_last


def places_of(steps: Sequence[Step]) -> list[Place]:
    """Return the place of each step of a schedule."""
    places: list[Place] = []
    for expert, run in itertools.groupby(steps, key=lambda step: step.expert):
        taken = list(run)
        for i, step in enumerate(taken):
            begins = i == 0 or step.stage != taken[i - 1].stage
            places.append(Place(expert.slot, i, len(taken), step.is_last, begins))
    return places
