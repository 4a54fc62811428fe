"""Checks of a scheduler's arguments: errors name the value, the rule and the nearest valid value."""

import math
from typing import Any

import numpy as np
import torch


def check_shift(shift: float) -> None:
    """Refuse a shift that is not finite and above 0."""
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be finite and above 0, got {shift}; 1 leaves the schedule unshifted")


def check_solver_order(solver_order: int) -> None:
    """Refuse an order that the multistep solvers do not have."""
    if solver_order not in (1, 2):
        nearest = 1 if solver_order < 1 else 2
        raise ValueError(f"solver_order must be 1 or 2, got {solver_order}; the nearest is {nearest}")


def checked_table(
    name: str, values: Any, top: float, num_inference_steps: int | None, shift: float | None
) -> np.ndarray:
    """Return custom sigmas or timesteps in float64; they must fall strictly within (0, top]."""
    table = torch.as_tensor(values, dtype=torch.float64, device="cpu").numpy()
    if table.ndim != 1 or len(table) < 1:
        raise ValueError(f"{name} must be a list of at least 1 value, got shape {table.shape}")
    if num_inference_steps is not None and num_inference_steps != len(table):
        raise ValueError(
            f"num_inference_steps={num_inference_steps} contradicts {len(table)} {name}; leave it out"
        )
    if shift is not None:
        raise ValueError(
            f"shift={shift} was given with {name}, which are used as they are; leave the shift out"
        )
    for index, value in enumerate(table):
        if not 0 < value <= top:
            hint = f"the nearest is {top}" if value > top else "the final 0 is appended, leave it out"
            raise ValueError(f"{name} must lie in (0, {top}], got {name}[{index}] = {value:g}; {hint}")
        before = table[max(index - 1, 0)]
        if index and np.float32(value) >= np.float32(before):
            raise ValueError(
                f"{name} must fall at every step, got {name}[{index}] = {value:g} after {before:g}; "
                f"in order: {sorted(set(table.tolist()), reverse=True)}"
            )
    return table
