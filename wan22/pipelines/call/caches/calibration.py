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

    def ratios(self) -> dict[str, tuple[float, ...]]:
        """Return the mean ratio of each step over videos and passes; that of an expert's first step is 1."""
        ratios: dict[str, list[float]] = {}
        for place in self.places:
            found = self._found.get(place, [1.0])
            ratios.setdefault(place.slot, []).append(round(sum(found) / len(found), 6))
        return {slot: tuple(values) for slot, values in ratios.items()}


class MeasuringPredictor:
    """Runs all passes, and compares the norms of their residuals with those of the step before.

    Source: Zehong-Ma/MagCache, MagCache4Wan2.2/magcache_generate.py, the calibration.
    """

    def __init__(self, inner: Any, calibration: Calibration, call: Any, ranks: Any) -> None:
        self.inner, self.calibration = inner, calibration
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
                self.calibration.add(place, float((norms / before.clamp_min(1e-8)).mean()))
            self._norms[name, video] = norms

        return self.inner(latents, step, passes, videos, Residuals(keep=keep))
