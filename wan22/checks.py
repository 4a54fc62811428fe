"""Checks of plain arguments. Each error names argument, value, rule and the nearest valid value."""

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of the choices."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0.5)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}{hint}")


def as_int(value: Any) -> Any:
    """Return whole numbers of any library as int, and anything else as it is."""
    return int(value) if _is_int(value) else value


def check_positive_int(name: str, value: Any, most: int | None = None, least: int = 1) -> None:
    """Refuse a count that is not an int from `least` to `most`."""
    if _is_int(value) and value >= least and (most is None or value <= most):
        return
    rule = f"at least {least}" if most is None else f"{least} to {most}"
    nearest = max(least, round(value)) if _is_finite(value) else least
    nearest = nearest if most is None else min(nearest, most)
    raise ValueError(f"{name}={value!r} must be an int, {rule}; the nearest is {nearest}")


def check_size(name: str, value: int, multiple: int) -> None:
    """Refuse a width or height that is not a positive multiple of what one token covers."""
    if not _is_int(value) or value <= 0 or value % multiple:
        nearest = _nearest(value, multiple)
        raise ValueError(f"{name}={value!r} must be an int, a positive multiple of {multiple}; {nearest}")


def check_num_frames(value: int, stride: int) -> None:
    """Refuse a frame count that does not fill whole latent frames."""
    if not _is_int(value) or value < 1 or (value - 1) % stride:
        nearest = _nearest(value, stride, plus=1, least=0)
        raise ValueError(f"num_frames={value!r} must be an int, 1 + a multiple of {stride}; {nearest}")


def parse_bytes(amount: str | float, name: str = "amount") -> int:
    """Return a number of bytes: 12 * 10**9 for "12GB", 12 * 2**30 for "12GiB"; a number stays as it is.

    A rate, such as "1.5GB/s", gives bytes a second.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:E\+?\d+)?)\s*([KMGT]?I?)B?(?:/S)?", str(amount).strip().upper())
    value = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if value < 1:
        rule = "must be at least one byte, written as '12GB', '11.5GiB' or a number of bytes"
        raise ValueError(f"{name}={amount!r} {rule}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _nearest(value: Any, multiple: int, plus: int = 0, least: int = 1) -> str:
    if not _is_finite(value):
        return f"give an int such as {plus + multiple * 4}"
    below = max(int((value - plus) // multiple), least)
    return f"the nearest are {plus + below * multiple} and {plus + (below + 1) * multiple}"
