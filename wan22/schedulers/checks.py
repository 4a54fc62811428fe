"""Checks of a scheduler's arguments: errors name the value, the rule and the nearest valid value."""

from typing import Any

import numpy as np
import torch

from ..checks import check_real, cut, shown, with_plain_numbers


def check_shift(name: str, shift: Any) -> float:
    """Return a shift as a number; refuse one that is not finite and above 0."""
    return check_real(name, shift, 0, above=True, hint="1 leaves the schedule unshifted")


def checked_table(
    name: str, values: Any, top: float, num_inference_steps: int | None, shift: float | None
) -> np.ndarray:
    """Return custom sigmas or timesteps in float64; they must fall strictly within (0, top]."""
    try:
        table = torch.as_tensor(with_plain_numbers(values), dtype=torch.float64, device="cpu").numpy()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name}={shown(values)} must be a list of numbers") from error
    if table.ndim != 1 or len(table) < 1:
        raise ValueError(f"{name} must be a list of at least 1 value, got shape {table.shape}")
    if num_inference_steps is not None and num_inference_steps != len(table):
        raise ValueError(
            f"num_inference_steps={num_inference_steps} contradicts {len(table)} {name}; leave it out"
        )
    if shift is not None:
        raise ValueError(
            f"shift={shown(shift)} was given with {name}, which are used as they are; leave the shift out"
        )
    # As the schedule holds them: float32 must tell them apart.
    nearest = {np.float32(value): value for value in np.clip(table[table > 0], None, top)}
    listed = cut(", ".join(f"{nearest[level]:.10g}" for level in sorted(nearest, reverse=True)))
    hint = f"the nearest are [{listed}]" if nearest else f"such as [{top}]"
    for index, value in enumerate(table):
        if not 0 < value <= top:
            rest = "; the final 0 is appended, leave it out" if value == 0 else ""
            raise ValueError(f"{name} must lie in (0, {top}], got {name}[{index}] = {value:g}{rest}; {hint}")
        before = table[max(index - 1, 0)]
        if index and np.float32(value) >= np.float32(before):
            raise ValueError(
                f"{name} must fall at every step, got {name}[{index}] = {value:g} after {before:g}; {hint}"
            )
    return table
