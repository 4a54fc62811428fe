"""UniPC, the official code's default solver: a multistep predictor, corrected with the next prediction."""

from typing import Any

import torch

from ..checks import check_positive_int
from . import hub_config
from .flow_match import FlowMatchScheduler, half_log_snr, x0_from_velocity


class FlowMatchUniPCScheduler(FlowMatchScheduler):
    """Multistep UniPC on the predicted clean sample, with B(h) = exp(-h) - 1 ("bh2").

    The noise levels are shift(linspace(sigma_start, 0, n + 1)), where sigma_start is 0.999 in float32, the
    largest level of the unshifted training schedule.

    Args:
        num_train_timesteps, shift, **settings: as in `FlowMatchScheduler`.
        solver_order: 1 or 2; the first and the last step are of order 1. The corrector raises each by one.
    Source: Zhao et al. 2023, arXiv:2302.04867, UniP and UniC for data prediction; Wan2.2
    wan/utils/fm_solvers_unipc.py, FlowUniPCMultistepScheduler.
    """

    schema = hub_config.UNIPC

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

    @property
    def sigma_start(self) -> float:
        """First noise level before the shift; the official table holds it in float32."""
        return torch.tensor(1 - 1 / self.config["num_train_timesteps"]).item()

    def _reset(self) -> None:
        self._x0s: list[torch.Tensor] = []  # latest last
        self._corrected: torch.Tensor | None = None  # the sample of the step before
        self._order = 1  # with which the sample at hand was predicted

    def _solve(
        self, index: int, sample: torch.Tensor, velocity: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        x0 = x0_from_velocity(sample, velocity, self.sigmas[index])
        if self._corrected is not None:
            sample = self._update(index - 1, self._corrected, self._order, next_x0=x0)
        self._x0s = [*self._x0s, x0][-self.config["solver_order"] :]
        self._order = min(len(self._x0s), len(self.sigmas) - 1 - index)
        self._corrected = sample
        return self._update(index, sample, self._order)

    def _update(
        self, index: int, sample: torch.Tensor, order: int, next_x0: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Go from sigmas[index] to sigmas[index + 1]: UniP, or UniC if the x0 predicted there is given."""
        s, t = self.sigmas[index], self.sigmas[index + 1]
        lambda_s = half_log_snr(s)
        h = half_log_snr(t) - lambda_s
        b = torch.expm1(-h)  # B(h), and at once the factor of x0
        x0 = self._x0s[-1]

        residual: torch.Tensor | float  # the sum of a_m D_m / r_m over the other nodes
        if order == 1:
            residual = 0.0 if next_x0 is None else 0.5 * (next_x0 - x0)
        else:
            # The node one step back; r is infinite after a start at sigma 1, and the slope then 0.
            r = (half_log_snr(self.sigmas[index - 1]) - lambda_s) / h
            slope = (self._x0s[-2] - x0) / r
            if next_x0 is None:
                residual = 0.5 * slope
            else:
                # [[1, 1], [r, 1]] a = g makes the update exact for x0 linear and quadratic in lambda.
                phi = -b / h - 1
                g1, g2 = phi / b, 2 * (-phi / h - 0.5) / b
                a1 = (g1 - g2) / (1 - r)
                residual = a1 * slope + (g1 - a1) * (next_x0 - x0)
        return t / s * sample - (1 - t) * b * x0 - (1 - t) * b * residual
