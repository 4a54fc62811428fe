"""Which steps are skipped, where their indices alone decide."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from .places import Place
from .settings import MagCache, StepCache, TaylorCache


class Decision(ABC):
    """Decides which of an expert's steps are skipped."""

    @abstractmethod
    def skips(self, place: Place) -> bool:
        """Whether a step that may be skipped is; it is asked once for each such step, in their order."""

    @abstractmethod
    def computed(self, place: Place) -> None:
        """Take note that a step is computed."""


class MagnitudeError(Decision):
    """Sums, over the steps that are skipped in a row, how far the magnitude is off.

    Args:
        ratios: of each of an expert's steps.
        threshold: sum of errors below which a step is skipped.
        most_skips: steps in a row that may be skipped.

    Source: Zehong-Ma/MagCache, MagCache4Wan2.2/magcache_generate.py.
    """

    def __init__(self, ratios: list[float], threshold: float, most_skips: int) -> None:
        self.ratios, self.threshold, self.most_skips = ratios, threshold, most_skips
        self._start()

    def _start(self) -> None:
        self.ratio, self.error, self.skipped = 1.0, 0.0, 0

    def skips(self, place: Place) -> bool:
        """See Decision."""
        self.ratio *= self.ratios[place.index]
        self.skipped += 1
        self.error += abs(1 - self.ratio)
        return self.error < self.threshold and self.skipped <= self.most_skips

    def computed(self, place: Place) -> None:
        """See Decision."""
        self._start()


class EveryNth(Decision):
    """Computes a step once as many as `interval` lie behind the last computed one."""

    def __init__(self, interval: int) -> None:
        self.interval, self.last = interval, 0

    def skips(self, place: Place) -> bool:
        """See Decision."""
        return place.index - self.last < self.interval

    def computed(self, place: Place) -> None:
        """See Decision."""
        self.last = place.index


def decision_of(cache: StepCache, place: Place) -> Decision | None:
    """Return what decides for the expert of a place; None if latents have a say."""
    if isinstance(cache, MagCache):
        assert cache.ratios is not None, "a call completes them"
        ratios = cache.ratios.resampled(place.slot, place.count)
        return MagnitudeError(ratios, cache.at("threshold", place.slot), cache.at("most_skips", place.slot))
    return EveryNth(cache.at("interval", place.slot)) if isinstance(cache, TaylorCache) else None


def computed_steps(cache: StepCache | None, places: Sequence[Place]) -> list[bool]:
    """Return for each step of a schedule whether it is computed: at most, if latents have a say."""
    found: list[bool] = []
    decision: Decision | None = None
    for place in places:
        if place.begins:
            decision = None if cache is None else decision_of(cache, place)
        skipped = False
        if cache is not None and decision is not None:
            skipped = place.may_be_skipped(cache.at("warmup", place.slot)) and decision.skips(place)
            if not skipped:
                decision.computed(place)
        found.append(not skipped)
    return found
