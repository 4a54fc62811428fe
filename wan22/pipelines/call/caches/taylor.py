"""TaylorSeer: the blocks' residual is forecast by its differences from computed step to computed step."""

import math

import torch

from .places import Place
from .skipping import ResidualPredictor, ResidualTrack


class Series:
    """A residual and its differences, per step, at the last computed step."""

    def __init__(self) -> None:
        self.index = self.span = 0  # the last computed step, and how many it is behind the one before
        self.terms: list[torch.Tensor] = []  # the residual, its first difference, its second

    def add(self, index: int, residual: torch.Tensor, order: int) -> None:
        """Take the residual of a computed step; each of its differences is that of the one before.

        Source: diffusers/hooks/taylorseer_cache.py.
        """
        self.index, self.span, terms = index, index - self.index, [residual]
        for before in self.terms[:order]:
            terms.append((terms[-1] - before) / self.span)
        self.terms = terms

    def at(self, index: int) -> torch.Tensor:
        """Return the forecast for a later step: the sum of term j times its distance to the j over j!.

        It goes no farther than the differences span: after a warm-up, they are those of two steps in a row.
        """
        steps = min(index - self.index, self.span)
        forecast = self.terms[0]
        for j, term in enumerate(self.terms[1:], start=1):
            forecast = forecast + term * (steps**j / math.factorial(j))
        return forecast


class TaylorPredictor(ResidualPredictor):
    """Adds a forecast of the residual."""

    def keep(self, track: ResidualTrack, place: Place, name: str, residual: torch.Tensor) -> None:
        """See ResidualPredictor."""
        series = track.residuals.setdefault(name, Series())
        series.add(place.index, residual, self.cache.at("order", place.slot))

    def supply(self, track: ResidualTrack, place: Place, name: str) -> torch.Tensor:
        """See ResidualPredictor."""
        return track.residuals[name].at(place.index)
