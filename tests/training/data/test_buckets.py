"""Sizes and lengths of clips, by properties and by a formula written out."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import builders
from wan22.pipelines.call.images import closest_size
from wan22.training.data.buckets import Rules, bucket_size, check_rules, kind_of, windows
from wan22.training.data.config import EXTRACTIONS, DataConfig

sides = st.integers(16, 4096)
sizes = st.tuples(sides, sides)


def rules(kind="t2v", cell=16):
    return Rules(kind, (cell, cell), 4, 16, 81, (832, 480))


@settings(max_examples=200, deadline=None)
@given(
    sizes, st.tuples(st.integers(64, 1280), st.integers(64, 1280)), st.sampled_from([16, 32]), st.booleans()
)
def test_a_bucket_has_whole_cells_the_area_and_the_aspect(size, resolution, cell, upscale):
    assume(max(size) <= 8 * min(size) and min(size) >= 4 * cell)
    config = DataConfig("a", resolution=resolution, upscale=upscale)
    most = resolution[0] * resolution[1]
    area = most if upscale else min(most, size[0] * size[1])
    wide, tall = (area * size[0] / size[1]) ** 0.5, (area * size[1] / size[0]) ** 0.5
    if min(wide, tall) < 2 * cell:  # it fits, or is refused by name
        try:
            w, h = bucket_size(size, config, rules(cell=cell))
        except ValueError as error:
            assert "with that aspect" in str(error)
            return
        assert w % cell == 0 and h % cell == 0
        return
    w, h = bucket_size(size, config, rules(cell=cell))
    assert w % cell == 0 and h % cell == 0 and w * h <= most
    if not upscale:
        assert w <= size[0] and h <= size[1]
    # Each side is within a cell of the one that the aspect and the area give.
    assert w > wide - cell - 1e-6 and h > tall - cell - 1e-6
    if upscale:
        assert (w, h) == closest_size(size, area, (cell, cell))


def test_without_buckets_all_have_the_resolution():
    config = DataConfig("a", resolution=(96, 64), buckets=False, upscale=False)
    assert bucket_size((1000, 100), config, rules()) == (96, 64)
    with pytest.raises(ValueError, match="it has 95x640 pixels, less than 96x64"):
        bucket_size((95, 640), config, rules())
    check_rules(config, rules())
    with pytest.raises(ValueError, match=r"width=96 must be .*, a positive multiple of 64"):
        check_rules(config, rules(cell=64))
    with pytest.raises(
        ValueError, match=r"frames=6 must be an int, 1 \+ a multiple of 4; the nearest are 5 and 9"
    ):
        check_rules(DataConfig("a", frames=(5, 6)), rules())


def test_the_checkpoint_decides_the_area_if_nothing_else_does():
    assert bucket_size((1664, 960), DataConfig("a"), rules()) == (832, 480)
    with pytest.raises(
        ValueError, match="it has 4000x16 pixels; with that aspect, 399360 pixels have no sides"
    ):
        bucket_size((4000, 16), DataConfig("a", upscale=False), rules(cell=32))


lengths = st.lists(st.integers(0, 30).map(lambda k: 1 + 4 * k), min_size=1, max_size=4, unique=True)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 200),
    lengths,
    st.sampled_from(EXTRACTIONS),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 6),
)
def test_windows_lie_in_the_video(count, frames, extraction, every_length, stride, samples):
    settings = {"extraction": extraction, "stride": stride, "samples": samples, "max_frames": 129}
    config = DataConfig("a", frames=tuple(frames), every_length=every_length, **settings)
    found = windows(count, config, rules())
    assert len(set(found)) == len(found) and found == sorted(found)
    for start, length in found:
        assert start >= 0 and start + length <= count and length % 4 == 1
    fitting = [n for n in sorted(frames) if n <= count]
    if extraction == "full":
        assert found == [(0, (min(count, 129) - 1) // 4 * 4 + 1)]
        return
    chosen = fitting if every_length else fitting[-1:]
    assert {length for _, length in found} == set(chosen)
    for length in chosen:
        starts = [start for start, n in found if n == length]
        last = count - length
        expected = {
            "head": [0],
            "chunk": [i for i in range(count) if i % length == 0 and i <= last],
            "slide": [i for i in range(count) if i % stride == 0 and i <= last],
            "uniform": sorted({int(last * i / max(samples - 1, 1)) for i in range(samples)}),
        }[extraction]
        assert len(starts) == len(expected) and all(
            abs(a - b) <= 1 for a, b in zip(starts, expected, strict=True)
        )
        if extraction != "uniform":
            assert starts == expected


def test_lengths_that_nobody_names_are_all_up_to_the_checkpoints():
    assert windows(80, DataConfig("a"), rules()) == [(0, 77)]
    assert windows(500, DataConfig("a"), rules()) == [(0, 81)]
    assert windows(170, DataConfig("a", extraction="chunk"), rules()) == [(0, 81), (81, 81)]
    assert windows(4, DataConfig("a"), rules("i2v")) == []
    assert windows(40, DataConfig("a", frames=(1, 17), every_length=True), rules("i2v")) == [(0, 17)]


@pytest.mark.parametrize(
    ("pipe", "kind", "cell"),
    [
        (builders.random_pipeline, "t2v", 16),
        (builders.random_i2v_pipeline, "i2v", 16),
        (builders.random_ti2v_pipeline, "ti2v", 32),
        (lambda: builders.random_i2v_pipeline(1), "i2v", 16),
        (lambda: builders.random_i2v_pipeline(1, two_frames=True), "flf2v", 16),
        (lambda: builders.random_pipeline(transformer=None, transformer_2=None), "t2v", 16),
        (lambda: builders.random_i2v_pipeline(transformer=None, transformer_2=None), "i2v", 16),
    ],
)
def test_rules_of_a_pipeline(pipe, kind, cell):
    pipe = pipe()
    found = Rules.of(pipe)
    assert (found.kind, found.cell, found.stride) == (kind, (cell, cell), 4) and kind_of(pipe) == kind
    assert (found.fps, found.frames) == (pipe.preset.fps, pipe.preset.num_frames)
    assert found.least_frames == (5 if kind in ("i2v", "flf2v") else 1)
