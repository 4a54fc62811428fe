"""Rows that layers keep from strip to strip: no row is lost, doubled or too early."""

from itertools import pairwise

import pytest
import torch

from wan22.models.strip_rows import StripRows, split_rows


def _rows(start, stop):
    return torch.arange(start, stop, dtype=torch.float32).reshape(1, 1, 1, -1, 1)


def _fed(spans, step):
    """What a layer's step gives for each strip of rows that are numbered from 1."""
    rows = StripRows(spans)
    frame = _rows(1, spans[-1][1] + 1)
    return [step(rows, frame[:, :, :, strip]).flatten().tolist() for strip in rows.strips()]


def test_rows_between_their_neighbours():
    """Of all strips, those that have two neighbours are all rows, once."""
    parts = _fed([(0, 2), (2, 3), (3, 6)], lambda rows, x: rows.around("a", x))
    assert parts == [[0, 1, 2], [1, 2, 3], [2, 3, 4, 5, 6, 0]]
    assert _fed([(0, 6)], lambda rows, x: rows.around("a", x)) == [[0, 1, 2, 3, 4, 5, 6, 0]]


def test_windows_of_three_rows():
    parts = _fed([(0, 4), (4, 5), (5, 8)], lambda rows, x: rows.windows("a", x))
    assert parts == [[1, 2, 3], [3, 4, 5], [5, 6, 7, 8]]


def test_the_next_rows():
    counts = iter([1, 3, 2])
    parts = _fed([(0, 3), (3, 4), (4, 6)], lambda rows, x: rows.first("a", x, next(counts)))
    assert parts == [[1], [2, 3, 4], [5, 6]]


def test_what_is_kept_is_a_copy():
    rows = StripRows([(0, 5), (5, 6)])
    x = _rows(0, 6)
    for strip in rows.strips():
        if strip.start == 0:
            rows.first("a", x[:, :, :, strip], 4)
            assert rows._kept["a"].untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    ("rows", "count", "lag", "multiple", "strips"),
    [(20, 3, 5, 1, 3), (45, 99, 7, 1, 6), (44, 99, 7, 2, 5), (6, 4, 7, 1, 1), (8, 9, 1, 1, 7)],
)
def test_the_strips_of_a_frame(rows, count, lag, multiple, strips):
    spans = split_rows(rows, count, lag, multiple)
    assert len(spans) == strips
    assert spans[0][0] == 0 and spans[-1][1] == rows
    assert all(a[1] == b[0] and b[0] % multiple == 0 for a, b in pairwise(spans))
    late = -(-lag // multiple) * multiple
    results = [stop - late for _, stop in spans[:-1]] + [rows]
    heights = [stop - start for start, stop in pairwise([0, *results])]
    assert min(heights) > 0
    assert max(heights) - min(heights) <= multiple
    assert all(stop > start for start, stop in spans)
