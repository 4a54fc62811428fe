"""Euler's method: one straight step along the velocity."""

from typing import Any

import torch

from . import hub_config
from .flow_match import FlowMatchScheduler, x0_from_velocity


class FlowMatchEulerScheduler(FlowMatchScheduler):
    """First-order solver, the one that few-step distilled checkpoints are trained for.

    The noise levels are shift(linspace(1, 0, n + 1)), shifted once, and the timesteps keep their fractions:
    4 steps at shift 5 are 1000, 937.5, 833.33 and 625. (diffusers' FlowMatchEulerDiscreteScheduler shifts its
    first and last level and then the whole table again: other levels from the same config.) Arguments are
    those of `FlowMatchScheduler`; stochastic_sampling=True predicts the clean sample at each step and adds
    fresh noise, down to the next level, as DMD, rCM and LCM sample.

    Source: Liu et al. 2022, arXiv:2209.03003, section 2 (the ODE dx = v dsigma by Euler's method); Yin et al.
    2024, arXiv:2405.14867, section 4.4 (fresh noise).
    """

    schema = hub_config.EULER
    truncates_timesteps = False

    def __init__(self, *, num_train_timesteps: int = 1000, shift: float = 1.0, **settings: Any) -> None:
        super().__init__(num_train_timesteps, shift, **settings)

    def _solve(
        self, index: int, sample: torch.Tensor, velocity: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        if not self.config["stochastic_sampling"]:
            return sample + (sigma_next - sigma) * velocity
        noise = torch.randn(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return (1 - sigma_next) * x0_from_velocity(sample, velocity, sigma) + sigma_next * noise
