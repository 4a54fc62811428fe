"""MagCache: the residual's magnitude, whose course is known, says how far a kept residual is off."""

import torch

from .places import Place
from .skipping import ResidualPredictor, ResidualTrack


class MagPredictor(ResidualPredictor):
    """Adds the residual of the last computed step as it was."""

    def keep(self, track: ResidualTrack, place: Place, name: str, residual: torch.Tensor) -> None:
        """See ResidualPredictor."""
        track.residuals[name] = residual

    def supply(self, track: ResidualTrack, place: Place, name: str) -> torch.Tensor:
        """See ResidualPredictor."""
        return track.residuals[name]
