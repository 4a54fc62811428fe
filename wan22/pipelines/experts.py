"""The two transformer slots, and which one serves a timestep."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expert:
    """One transformer as the loop uses it.

    Args:
        slot: the pipeline's component, "transformer" or "transformer_2".
        label: what people call it: "high noise", "low noise", or "" if it is the only one.
        model: the transformer, or None if it is not loaded.
        guidance_scale: classifier-free guidance, 1 turns it off.
    """

    slot: str
    label: str
    model: Any
    guidance_scale: float


class Experts:
    """Chooses the transformer for each timestep.

    Args:
        transformer: the high-noise expert, or the only one.
        transformer_2: the low-noise expert.
        boundary: the high-noise expert serves timesteps at or above it; None if there is one transformer.
        guidance_scales: of the first and of the second slot.

    Source: Wan2.2 wan/text2video.py, WanT2V.generate.
    """

    def __init__(
        self,
        transformer: Any,
        transformer_2: Any,
        boundary: float | None,
        guidance_scales: tuple[float, float],
    ) -> None:
        labels = ("", "") if boundary is None else ("high noise", "low noise")
        self.boundary = boundary
        self.high = Expert("transformer", labels[0], transformer, guidance_scales[0])
        self.low = Expert("transformer_2", labels[1], transformer_2, guidance_scales[1])

    def serving(self, timestep: float) -> Expert:
        """Return the expert of a timestep in 0 to 1000."""
        return self.high if self.boundary is None or timestep >= self.boundary else self.low

    def needed(self, timesteps: Iterable[float]) -> list[Expert]:
        """Return the experts that a schedule reaches, in order.

        Raises:
            ValueError: one of them is not loaded.
        """
        reached = []
        for timestep in timesteps:
            expert = self.serving(timestep)
            if expert.model is None:
                served_by = f"the {expert.label or 'only'} expert, but pipe.{expert.slot} is None"
                raise ValueError(
                    f"timestep {timestep:g} is served by {served_by}; load it, or choose timesteps on the "
                    f"other side of {self.boundary or 0:g}."
                )
            if expert not in reached:
                reached.append(expert)
        return reached

    def after(self, timesteps: Sequence[float]) -> Expert | None:
        """Return the expert of the step after the first of these, if it is another one."""
        serving, following = (self.serving(t) for t in (timesteps[0], timesteps[min(1, len(timesteps) - 1)]))
        return following if following != serving else None

    def guided(self, timesteps: Iterable[float]) -> bool:
        """Whether any step of a schedule needs the negative prompt."""
        return any(expert.guidance_scale != 1 for expert in self.needed(timesteps))
