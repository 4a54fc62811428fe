"""The loss of other clips, always at the same noise and the same noise levels."""

from typing import Any

import torch

from .config import TrainConfig
from .data.cached import CachedClips
from .samples import Drawing
from .trainee import Trainee

# Its noise is not the training's, and other settings of a training change nothing in it.
SEED = 0


class Validation:
    """Clips that are not trained on, and how their loss is measured.

    Args:
        clips: the clips.
        levels: noise levels of each, at the middles of parts of equal probability.
        first_frame: whether each clip's first frame is given at every other level, see `Drawing`.
    """

    def __init__(self, clips: CachedClips, levels: int, first_frame: bool = False) -> None:
        self.clips, self.levels = clips, levels
        self._drawing = Drawing(SEED, 0.0, 0.5 if first_frame else 0.0)

    @classmethod
    def of(cls, config: TrainConfig, base: Any) -> "Validation | None":
        """Return that of a training; None: it has none.

        Raises: ValueError: the clips were encoded for another checkpoint.
        """
        if config.validation is None:
            return None
        clips = CachedClips.open(config.validation)
        base.check_clips(config.validation, clips)
        return cls(clips, config.validation_levels, base.first_frame > 0)

    @torch.no_grad()
    def loss_of(self, trainee: Trainee) -> float:
        """Return the mean loss over all clips and levels."""
        trainee.model.eval()
        shares = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / self.levels
        total = 0.0
        for index in range(len(self.clips)):
            for level, sigma in enumerate(trainee.timesteps.within(shares)):
                number = index * self.levels + level
                found = trainee.losses_of(self.clips, self._drawing, [index], [number], sigma[None])
                total += found.double().sum().item()
        return total / (self.levels * len(self.clips))
