"""Measures, in one exact call, how the residual's magnitude changes from step to step."""

from typing import Any

import torch

from ..passes import Residuals
from .places import Place, places_of
from .settings import StepCache


class Calibration(StepCache):
    """In a cache's place in a call: it skips nothing, and has ratios by expert and step afterwards."""

    method = "calibration"
    presets = {}

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._found: dict[Place, list[float]] = {}

    @property
    def residuals(self) -> int:
        """See StepCache: each is gone before the next step, but was there."""
        return 1

    def plain(self) -> dict[str, Any]:
        """See StepCache."""
        return {"method": self.method}

    def add(self, place: Place, ratio: float) -> None:
        """Take a ratio of a step."""
        self._found.setdefault(place, []).append(ratio)

    def ratios(self, ranks: Any) -> dict[str, tuple[float, ...]]:
        """Return the mean ratio of each step over videos, passes and ranks; 1 for an expert's first step."""
        found = [self._found.get(place, []) for place in self.places]
        both = [[sum(each), len(each)] for each in found]
        sums, counts = ranks.total(torch.tensor(both, dtype=torch.float64)).T.tolist()
        ratios: dict[str, list[float]] = {}
        for place, total, count in zip(self.places, sums, counts, strict=True):
            ratios.setdefault(place.slot, []).append(round(total / count, 6) if count else 1.0)
        return {slot: tuple(values) for slot, values in ratios.items()}


class MeasuringPredictor:
    """Runs all passes, and compares the norms of their residuals with those of the step before.

    Ranks that share tokens have the norms of their own, and means over those of all.

    Source: Zehong-Ma/MagCache, MagCache4Wan2.2/magcache_generate.py, the calibration.
    """

    def __init__(self, inner: Any, calibration: Calibration, call: Any, ranks: Any) -> None:
        self.inner, self.calibration, self.ranks = inner, calibration, ranks
        calibration.places = places_of(call.steps)
        self._norms: dict[tuple[str, int], torch.Tensor] = {}  # "1 l", at the step before

    def __call__(self, latents: Any, step: Any, passes: Any, videos: Any) -> dict[str, torch.Tensor]:
        """Return what each pass predicts for some of the videos, "n c t h w" float32."""
        place = self.calibration.places[step.index]
        if place.begins:
            self._norms = {}

        def keep(name: str, video: int, residual: torch.Tensor) -> None:
            norms = torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)
            if (before := self._norms.get((name, video))) is not None:
                ratio = self.ranks.mean_over_tokens(norms / before.clamp_min(1e-8))
                self.calibration.add(place, ratio)
            self._norms[name, video] = norms

        return self.inner(latents, step, passes, videos, Residuals(keep=keep))
