"""Two results side by side, and how far apart they are."""

import math
from collections.abc import Sequence

import numpy as np

from .grid import Grid, Videos


class Comparison(Grid):
    """A video beside another: `print` shows what differs, `save` and `contact_sheet` show both.

    Attributes:
        psnr: peak signal-to-noise ratio in dB, over all frames; inf if they are equal, None if sizes differ.
        psnr_of_frames: that of each video's frames.
        max_abs: largest difference of two values, in [0, 1].
        seconds: that each of the calls took.

    Args:
        first, second: results of calls, with as many videos.
        labels: one per video, the first result's first; None: what differs between the recipes.

    Raises: ValueError: they have different numbers of videos, or frames are latents.
    """

    def __init__(self, first: Videos, second: Videos, labels: Sequence[str] | None = None) -> None:
        mine, theirs = first.as_arrays(), second.as_arrays()
        if len(mine) != len(theirs):
            raise ValueError(f"{len(mine)} videos cannot be compared with {len(theirs)}; give as many")
        super().__init__([first, second], labels, len(mine) if len(mine) > 1 else 2)
        self.seconds = first.seconds, second.seconds
        errors = [_errors(a, b) for a, b in zip(mine, theirs, strict=True) if a.shape == b.shape]
        known = len(errors) == len(mine)
        self.psnr = psnr(float(np.mean([mean for mean, _, _ in errors]))) if known else None
        self.psnr_of_frames = [[psnr(e) for e in frames] for _, frames, _ in errors] if known else None
        self.max_abs = max(largest for _, _, largest in errors) if known else None

    def __str__(self) -> str:
        lines = [f"{i}: {', '.join(label.splitlines())}" for i, label in enumerate(self.labels, start=1)]
        if self.psnr is None or self.max_abs is None:
            lines.append("of different sizes, which have no numeric difference")
        elif math.isinf(self.psnr):
            lines.append("equal frames")
        else:
            largest = f"{self.max_abs:.3g} ({self.max_abs * 255:.3g} of 255)"
            lines.append(f"PSNR {self.psnr:.1f} dB, largest difference {largest}")
        slow, fast = self.seconds
        if slow > 0 and fast > 0:
            lines.append(f"the second took {fast / slow:.2f} of the first's time")
        return "\n".join(lines)

    __repr__ = __str__


def psnr(error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]."""
    return math.inf if error == 0 else -10 * math.log10(error)


def _errors(first: np.ndarray, second: np.ndarray) -> tuple[float, list[float], float]:
    """Return the mean squared error of "t h w c", that of each frame, and the largest difference."""
    frames, largest = [], 0.0
    for a, b in zip(first, second, strict=True):  # frame by frame: in float64
        difference = np.abs(_in_unit(a) - _in_unit(b))
        frames.append(float(np.square(difference).mean()))
        largest = max(largest, float(difference.max()))
    return float(np.mean(frames)), frames, largest


def _in_unit(frame: np.ndarray) -> np.ndarray:
    """Return a frame of any dtype in [0, 1], float64."""
    return frame.astype(np.float64) / (255 if frame.dtype == np.uint8 else 1)
