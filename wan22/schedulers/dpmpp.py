"""DPM-Solver++(2M), the official code's second solver."""

from typing import Any

import torch

from ..checks import check_positive_int
from . import hub_config
from .flow_match import FlowMatchScheduler, half_log_snr, x0_from_velocity


class FlowMatchDPMSolverScheduler(FlowMatchScheduler):
    """Second-order multistep solver on the predicted clean sample.

    The noise levels are shift(linspace(1, 0, n + 1)); the first is exactly 1.

    Args:
        num_train_timesteps, shift, **settings: as in `FlowMatchScheduler`.
        solver_order: 1 or 2; the first and the last step are of order 1.
    Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2; Wan2.2 wan/utils/fm_solvers.py,
    FlowDPMSolverMultistepScheduler and get_sampling_sigmas.
    """

    schema = hub_config.DPMPP

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        solver_order: int = 2,
        **settings: Any,
    ) -> None:
        order = check_positive_int("solver_order", solver_order, most=2)
        super().__init__(num_train_timesteps, shift, solver_order=order, **settings)

    def _reset(self) -> None:
        self._previous_x0: torch.Tensor | None = None

    def _solve(
        self, index: int, sample: torch.Tensor, velocity: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        s, t = self.sigmas[index], self.sigmas[index + 1]
        h = half_log_snr(t) - half_log_snr(s)
        x0, previous = x0_from_velocity(sample, velocity, s), self._previous_x0
        self._previous_x0 = x0

        # exp - 1, not expm1: rounded as in the official code, whose trajectories this gives to the bit.
        decay = (1 - t) * (torch.exp(-h) - 1)
        prev_sample = t / s * sample - decay * x0
        last = index == len(self.sigmas) - 2
        if previous is None or last or self.config["solver_order"] == 1:
            return prev_sample
        # r is infinite after a start at sigma 1, and the slope then 0.
        r = (half_log_snr(s) - half_log_snr(self.sigmas[index - 1])) / h
        slope = (1 / r) * (x0 - previous)
        return prev_sample - 0.5 * decay * slope
