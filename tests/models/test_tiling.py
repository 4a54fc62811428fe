"""Splitting and blending: the pure functions."""

from itertools import pairwise

import pytest
import torch

from wan22.models.tiling import blend_tiles, blend_weights, make_tiles, split_axis

AXES = [(1, 4, 3), (4, 4, 2), (5, 4, 3), (7, 4, 3), (11, 4, 3), (12, 5, 2), (13, 5, 1), (9, 3, 3), (10, 3, 3)]


@pytest.mark.parametrize(("length", "size", "stride"), AXES)
def test_spans_cover_the_axis_in_steps_of_at_most_the_stride(length, size, stride):
    spans = split_axis(length, size, stride)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(stop - start == min(size, length) for start, stop in spans)
    steps = [b[0] - a[0] for a, b in pairwise(spans)]
    assert all(1 <= step <= stride for step in steps)


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize(("length", "size", "stride"), AXES)
def test_weights_sum_to_one(length, size, stride, scale):
    spans = split_axis(length, size, stride)
    total = torch.zeros(length * scale, dtype=torch.float64)
    for (start, stop), weight in zip(spans, blend_weights(spans, scale), strict=True):
        assert (weight > 0).all()
        total[start * scale : stop * scale] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_two_spans_fade_linearly_into_each_other():
    left, right = blend_weights([(0, 6), (2, 8)])
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    torch.testing.assert_close(left, torch.cat([torch.ones(2, dtype=torch.float64), 1 - ramp]))
    torch.testing.assert_close(right, torch.cat([ramp, torch.ones(2, dtype=torch.float64)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tiles_of_one_field_join_to_that_field(dtype):
    field = torch.randn(3, 2, 4, 7 * 2, 11 * 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiles = make_tiles(split_axis(3, 1, 1), split_axis(7, 4, 3), split_axis(11, 4, 2))
    joined = blend_tiles((tile.cut(field, 2) for tile in tiles), tiles, 2)
    assert joined.dtype == dtype
    torch.testing.assert_close(joined, field, rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=1e-6)


def test_a_step_between_tiles_is_spread_over_their_overlap():
    tiles = make_tiles([(0, 1)], [(0, 4)], split_axis(12, 8, 4))
    parts = [torch.full((1, 1, 1, 4, 8), value) for value in (0.0, 1.0)]
    row = blend_tiles(parts, tiles)[0, 0, 0, 0]
    assert (row[:4] == 0).all()
    assert (row[8:] == 1).all()
    assert row.diff().max() <= 0.26
