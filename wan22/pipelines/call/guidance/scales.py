"""A call's guidance: the formula, and its scale at each step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....accel.planning.passes import PassKind
from ....checks import check_real, shown
from ..checks import check_guidance
from ..experts import Step
from .guider import Guider, PassSettings, first_step
from .named import recorded

# One for all steps, one for each, or a function of the noise level, 0 to 1.
Scale = float | Sequence[float] | Callable[[float], float]


class LastBoth:
    """Remembers at which step both predictions were last made, by the expert at work and at its size."""

    def __init__(self) -> None:
        self._stage: Any = None
        self._index: int | None = None

    def since(self, step: Step) -> int | None:
        """Return the steps since then; None: this expert has not yet made both at this size."""
        return None if self._index is None or step.stage != self._stage else step.index - self._index

    def note(self, step: Step, passes: Iterable[str]) -> None:
        """Take note of the passes of a step."""
        if step.stage != self._stage:
            self._stage, self._index = step.stage, None
        if "uncond" in passes:
            self._index = step.index


@dataclass(frozen=True)
class Guidance:
    """A formula, and its scale at each step of a schedule."""

    guider: Guider
    scales: tuple[float, ...]  # 1: the step is not guided
    arguments: Mapping[str, Any]  # of the call, completed, as a recipe holds them

    def scale_at(self, step: Step) -> float:
        """Return the scale of a step."""
        return self.scales[step.index]

    def passes(self, steps: Sequence[Step]) -> list[Mapping[str, PassSettings]]:
        """Return the passes of each step of the schedule, unless a callback changes that."""
        found: list[Mapping[str, PassSettings]] = []
        last = LastBoth()
        for step in steps:
            found.append(self.guider.passes(step, self.scale_at(step), last.since(step)))
            last.note(step, found[-1])
        return found

    def kinds(self, steps: Sequence[Step]) -> list[tuple[PassKind, ...]]:
        """Return the passes of each step as a plan knows them."""
        return [tuple(settings.kind for settings in needed.values()) for needed in self.passes(steps)]

    def needs_negative(self, steps: Sequence[Step]) -> bool:
        """Whether the negative prompt takes part in any step."""
        return any(settings.needs_negative for needed in self.passes(steps) for settings in needed.values())


@dataclass(frozen=True)
class CheckedGuidance:
    """What a call asks for, checked as far as it can be before the steps are known."""

    guider: Guider
    scale: Scale  # of the high-noise expert or the only transformer, or of all steps
    scale_2: float | None  # of the low-noise expert; None where the other one has a value for each step
    interval: tuple[float, float] | None  # shares of the steps

    def over(self, steps: Sequence[Step], experts: int) -> Guidance:
        """Return the guidance of a schedule's steps, whose transformers are so many.

        Raises: ValueError: a list has another length, a function gives what is no scale, or no step lies in
            the interval.
        """
        scales = self._scales(steps)
        arguments = {
            "guidance": recorded(self.guider),
            "guidance_scale": self.scale if self.scale_2 is not None else list(scales),
            "guidance_scale_2": self.scale_2 if experts == 2 else None,
            "guidance_interval": None if self.interval is None else list(self.interval),
        }
        if self.interval is not None:
            first, last = (first_step(share, len(steps)) for share in self.interval)
            if first >= last:
                raise ValueError(f"guidance_interval={self.interval} holds none of the {len(steps)} steps")
            scales = [scale if first <= i < last else 1 for i, scale in enumerate(scales)]
        return Guidance(self.guider, tuple(scales), arguments)

    def _scales(self, steps: Sequence[Step]) -> list[float]:
        if callable(self.scale):
            given = [(step.sigma, self.scale(step.sigma)) for step in steps]
            return [check_guidance(f"guidance_scale({sigma:g})", scale) for sigma, scale in given]
        if self.scale_2 is not None:
            by_slot = {"transformer": self.scale, "transformer_2": self.scale_2}
            return [by_slot[step.expert.slot] for step in steps]  # type: ignore[misc]
        values = list(self.scale)  # type: ignore[arg-type]
        if len(values) != len(steps):
            raise ValueError(
                f"guidance_scale has {len(values)} values for {len(steps)} steps; give {len(steps)}, or one"
            )
        return values


def check_scales(given: Any, scale_2: Any) -> tuple[Scale, float | None]:
    """Return scales, the second None where the first says those of all steps; refuse wrong ones by name."""
    scale: Any = given.tolist() if getattr(given, "ndim", 0) else given
    if not callable(scale) and (not isinstance(scale, Sequence) or isinstance(scale, str)):
        scale = check_guidance("guidance_scale", scale)
        return scale, scale if scale_2 is None else check_guidance("guidance_scale_2", scale_2)
    if scale_2 is not None:
        raise ValueError(
            f"guidance_scale_2={shown(scale_2)}, and guidance_scale has a value for each step; leave "
            "guidance_scale_2 out"
        )
    if callable(scale):
        return scale, None
    return tuple(check_guidance(f"guidance_scale[{i}]", value) for i, value in enumerate(scale)), None


def check_interval(interval: Any) -> tuple[float, float] | None:
    """Return the shares of the steps between which guidance is on, from 0 to 1; refuse other values."""
    if interval is None:
        return None
    rule = "must be two shares of the steps, such as (0.2, 0.9)"
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise ValueError(f"guidance_interval={shown(interval)} {rule}")
    start = check_real("guidance_interval[0]", interval[0], 0, 1)
    return start, check_real("guidance_interval[1]", interval[1], start, 1)
