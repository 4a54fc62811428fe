"""What layers keep of frames that are computed in horizontal strips, from the top to the bottom.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns of a strip.

A layer gets each row of its input once, and keeps the last ones for the strip below. A result that needs rows
of the strip below comes out with that strip. So nothing is computed twice, however many strips there are.
Results lag behind their input, by one more row after each 3x3 convolution; the last strip catches up.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Span = tuple[int, int]


class StripRows:
    """The rows that each layer keeps from one strip to the next; `layer` is its `cache_key`.

    Args:
        spans: rows (start, stop) of the strips, top first.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.strip = 0
        self.top = self.bottom = True
        self._spans = spans
        self._kept: dict[str, Tensor] = {}

    def strips(self) -> Iterator[slice]:
        """Go from strip to strip, and yield the rows of each."""
        for strip, (start, stop) in enumerate(self._spans):
            self.strip, self.top, self.bottom = strip, strip == 0, strip == len(self._spans) - 1
            yield slice(start, stop)

    def around(self, layer: str, x: Tensor, halo: int = 1) -> Tensor:
        """Return the next rows that have `halo` known rows on either side, between those.

        Beyond the frame there are zeros.
        """
        zeros = x.new_zeros((*x.shape[:3], halo, x.shape[4]))
        above = zeros if self.top else self._kept.pop(layer)
        x = torch.cat([above, x, zeros] if self.bottom else [above, x], dim=3)
        self._keep(layer, x[:, :, :, -2 * halo :])
        return x

    def windows(self, layer: str, x: Tensor) -> Tensor:
        """Return the rows of the next known windows of three rows, each two rows below the one before.

        The frame's last window has two.
        """
        x = self._queued(layer, x)
        known = x.shape[3] if self.bottom else x.shape[3] - 1 + x.shape[3] % 2
        self._keep(layer, x[:, :, :, known - 1 :])
        return x[:, :, :, :known]

    def first(self, layer: str, x: Tensor, count: int) -> Tensor:
        """Return the first `count` rows that have not come out yet, of this strip and those above."""
        x = self._queued(layer, x)
        self._keep(layer, x[:, :, :, count:])
        return x[:, :, :, :count]

    def _queued(self, layer: str, x: Tensor) -> Tensor:
        return x if self.top else torch.cat([self._kept.pop(layer), x], dim=3)

    def _keep(self, layer: str, x: Tensor) -> None:
        if not self.bottom:
            # A copy, for a view would keep the whole strip's activation alive.
            self._kept[layer] = x.clone()


def split_rows(rows: int, count: int, lag: int, multiple: int = 1) -> list[Span]:
    """Divide rows into `count` strips whose results, `lag` rows late, are of equal height, up to a row.

    Strips start at multiples of `multiple`, and so many rows there are. There are fewer strips where a result
    would have less than `lag` rows, which the last one brings in any case.
    """
    rows, late = rows // multiple, -(-lag // multiple)
    count = max(min(count, (rows - 1) // late), 1)
    cuts = [0, *(late + rows * i // count for i in range(1, count)), rows]
    return [(start * multiple, stop * multiple) for start, stop in pairwise(cuts)]
