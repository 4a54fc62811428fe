"""The noise levels of training samples: a distribution, restricted to an expert's range.

A noise level sigma is 0 for clean latents and 1 for pure noise; the transformer's timestep is 1000 sigma.

Shapes: b samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checks import check_choice, check_positive_int, check_real
from .draws import permuted, uniform

SAMPLINGS = ("shift", "logit-normal", "uniform")


@dataclass(frozen=True)
class Timesteps:
    """A distribution of noise levels.

    Within the range it keeps its shape: it is that of an unrestricted draw that is repeated until it falls
    into the range. Numbers are drawn by quantile, so that nothing is repeated.

    Args:
        sampling: "shift": the sigmoid of a normal variable, shifted; "logit-normal": the same, not shifted,
            but of the given mean; "uniform", shifted.
        shift: factor of sigma / (1 - sigma), above 0; 1 shifts nothing, more favours high noise.
        mean, std: of the normal variable.
        low, high: the range, 0 to 1.
        strata: number of samples in a row that fall one each into as many parts of equal probability, which
            steadies the loss; 1 draws each by itself.

    Source: "shift" is that of Wan's inference schedule; sampling as in musubi-tuner and diffusion-pipe.
    """

    sampling: str = "shift"
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    strata: int = 16

    def __post_init__(self) -> None:
        check_choice("sampling", self.sampling, SAMPLINGS)
        check_real("shift", self.shift, 0, hint="1 shifts nothing", above=True)
        check_real("mean", self.mean)
        check_real("std", self.std, 0, hint="1 is the usual one", above=True)
        check_real("low", self.low, 0, 1)
        check_real("high", self.high, 0, 1)
        check_positive_int("strata", self.strata)
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")

    def quantile(self, share: torch.Tensor) -> torch.Tensor:
        """Return the noise level below which a share of the whole distribution lies, float64."""
        logit = self._logit_of_share(share.double())
        return torch.sigmoid(logit + math.log(self.shift) * (self.sampling != "logit-normal"))

    def share_below(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the share of the whole distribution below a noise level, float64; `quantile`'s inverse."""
        logit = torch.logit(sigma.double())
        logit = logit - math.log(self.shift) * (self.sampling != "logit-normal")
        if self.sampling == "uniform":
            return torch.sigmoid(logit)
        return torch.special.ndtr((logit - self._mean) / self.std)

    def sample(self, seed: int, numbers: Sequence[int]) -> torch.Tensor:
        """Return the noise levels "b" of samples by their numbers, float64."""
        return self.within(torch.tensor([self._place(seed, n) for n in numbers], dtype=torch.float64))

    def within(self, share: torch.Tensor) -> torch.Tensor:
        """Return the noise level below which a share of the distribution in the range lies, float64."""
        first, last = self.share_below(torch.tensor([self.low, self.high], dtype=torch.float64))
        # The ends of the tails are values that no draw has: their logits are infinite.
        return self.quantile(first + (last - first) * share.double()).clamp(self.low, self.high)

    def _place(self, seed: int, number: int) -> float:
        """Return a sample's share of the distribution in the range, in [0, 1)."""
        turn, place = divmod(number, self.strata)
        part = permuted(self.strata, seed, "strata", turn)[place]
        return (part + uniform(seed, "level", number)) / self.strata

    @property
    def _mean(self) -> float:
        return self.mean if self.sampling == "logit-normal" else 0.0

    def _logit_of_share(self, share: torch.Tensor) -> torch.Tensor:
        if self.sampling == "uniform":
            return torch.logit(share)
        return self._mean + self.std * torch.special.ndtri(share)
