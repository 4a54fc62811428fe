"""What counts and sizes there may be: whole tokens, whole latent frames. Errors name the nearest."""

import math
from typing import Any


def check_size(name: str, value: int, multiple: int) -> None:
    """Refuse a width or height that is not a positive multiple of what one token covers."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % multiple:
        raise ValueError(
            f"{name}={value!r} must be an int, a positive multiple of {multiple}; {_nearest(value, multiple)}"
        )


def check_num_frames(value: int, stride: int) -> None:
    """Refuse a frame count that does not fill whole latent frames."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (value - 1) % stride:
        nearest = _nearest(value, stride, plus=1, least=0)
        raise ValueError(f"num_frames={value!r} must be an int, 1 + a multiple of {stride}; {nearest}")


def check_positive_int(name: str, value: Any, most: int | None = None) -> None:
    """Refuse a count that is not an int from 1 to `most`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < 1
        or (most is not None and value > most)
    ):
        rule = "at least 1" if most is None else f"1 to {most}"
        nearest = round(value) if isinstance(value, (int, float)) and math.isfinite(value) else 1
        nearest = max(1, nearest if most is None else min(nearest, most))
        raise ValueError(f"{name}={value!r} must be an int, {rule}; the nearest is {nearest}")


def _nearest(value: Any, multiple: int, plus: int = 0, least: int = 1) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return f"give an int such as {plus + multiple * 4}"
    below = max(int((value - plus) // multiple), least)
    return f"the nearest are {plus + below * multiple} and {plus + (below + 1) * multiple}"
