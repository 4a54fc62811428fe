"""Split a video into overlapping tiles and blend their results: pure functions.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.

Tiles are laid out in latent cells; `scale` turns cells into pixels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import at_least_float32


class Tile(NamedTuple):
    """A block of samples, rows and columns, each a (start, stop) pair in latent cells."""

    samples: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    def cut(self, x: Tensor, scale: int = 1) -> Tensor:
        """Return this tile of "b c t h w", a view; `scale` elements of x make a cell."""
        return x[self.place(scale)]

    def place(self, scale: int = 1) -> tuple[slice, ...]:
        """Return the index of this tile in "b c t h w" whose cells are `scale` elements wide."""
        (top, bottom), (left, right) = self.rows, self.columns
        rows, columns = slice(top * scale, bottom * scale), slice(left * scale, right * scale)
        return slice(*self.samples), slice(None), slice(None), rows, columns


def split_axis(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Cover `length` cells by spans (start, stop) of `size` that start every `stride` cells, at most `size`.

    The last one is moved back to end with the axis; an axis shorter than `size` is one span.
    """
    if length <= size:
        return [(0, length)]
    last = length - size
    return [(start, start + size) for start in (*range(0, last, stride), last)]


def blend_weights(spans: Sequence[tuple[int, int]], scale: int = 1) -> list[Tensor]:
    """Return float64 weights of each span's elements, `scale` a cell, that sum to 1 at every place.

    Where two spans overlap, one fades linearly into the other: a constant stays, and borders leave no step.
    """
    length = max(stop for _, stop in spans) * scale
    total = torch.zeros(length, dtype=torch.float64)
    weights = []
    for start, stop in spans:
        start, stop = start * scale, stop * scale
        position = torch.arange(stop - start, dtype=torch.float64) + 0.5
        # Distance to the nearest end, not counting ends that are the axis's own.
        fade_in = position if start > 0 else torch.full_like(position, length)
        fade_out = position.flip(0) if stop < length else torch.full_like(position, length)
        weights.append(torch.minimum(fade_in, fade_out))
        total[start:stop] += weights[-1]
    return [
        weight / total[start * scale : stop * scale]
        for weight, (start, stop) in zip(weights, spans, strict=True)
    ]


def make_tiles(
    samples: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]]
) -> list[Tile]:
    """Combine the spans of three axes into tiles, sample by sample, row by row."""
    return [Tile(s, r, c) for s in samples for r in rows for c in columns]


def blend_tiles(parts: Iterable[Tensor], tiles: Sequence[Tile], scale: int = 1) -> Tensor:
    """Join the tiles' results "b c t h w", in their dtype; `scale` elements make a cell.

    The parts come in the order of `tiles` and are consumed one by one: a generator keeps only one in memory.
    """
    if len(tiles) == 1:
        return next(iter(parts))
    spans_h = sorted({tile.rows for tile in tiles})
    spans_w = sorted({tile.columns for tile in tiles})
    weights_h = dict(zip(spans_h, blend_weights(spans_h, scale), strict=True))
    weights_w = dict(zip(spans_w, blend_weights(spans_w, scale), strict=True))
    batch = max(tile.samples[1] for tile in tiles)
    height, width = spans_h[-1][1] * scale, spans_w[-1][1] * scale
    joined = None
    for tile, part in zip(tiles, parts, strict=True):
        if joined is None:
            # Sums of products with fractions: at least float32, or half types would show the overlaps.
            shape = batch, part.shape[1], part.shape[2], height, width
            joined = part.new_zeros(shape, dtype=at_least_float32(part.dtype))
        weight = weights_h[tile.rows][:, None] * weights_w[tile.columns]
        joined[tile.place(scale)] += part * weight.to(joined)
        dtype = part.dtype
    if joined is None:
        raise ValueError("there are no tiles to blend")
    return joined.to(dtype)
