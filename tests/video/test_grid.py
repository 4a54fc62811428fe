"""Videos side by side: frames where they belong, in time and place, below their labels."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import wan22
from tests.video.test_result import FPS, H, T, W, read, recipe, video
from wan22 import WanVideo
from wan22.video.grid import SMALLEST
from wan22.video.metadata import read_recipe
from wan22.video.sheets import MARGIN

FACTOR = -(-SMALLEST // W)
CELL = FACTOR * W + 2 * MARGIN, FACTOR * H + 2 * MARGIN


def with_seed(seed, count=1):
    made = video(count)
    return WanVideo(frames=made.frames, fps=FPS, recipe=recipe(count, seed=[seed + i for i in range(count)]))


def cell(frame, column, row, label_height):
    """Return a cell's frame, as small as it was."""
    top = row * (label_height + CELL[1]) + label_height + MARGIN
    left = column * CELL[0] + MARGIN
    return frame[top : top + FACTOR * H : FACTOR, left : left + FACTOR * W : FACTOR]


def test_each_video_has_its_cell():
    both = with_seed(0, 2)
    found = wan22.grid([both, with_seed(5)], columns=2)
    assert found.labels == ["seed 0", "seed 1", "seed 5"] and len(found) == T
    frames = list(found.frames())
    height, width, _ = frames[0].shape
    assert width == 2 * CELL[0] and len(frames) == T
    label = height // 2 - CELL[1]
    expected = [*both.as_uint8(), video().as_uint8()[0]]
    for t in (0, T - 1):
        for i, (column, row) in enumerate([(0, 0), (1, 0), (0, 1)]):
            assert np.array_equal(cell(frames[t], column, row, label), expected[i][t])
        assert frames[t][: label - 2, : CELL[0]].any(), "the label"
        assert not frames[t][label + CELL[1] :, CELL[0] :].any(), "nobody is there"


def test_others_lengths_rates_and_sizes():
    half = WanVideo(
        frames=video().frames[:, ::2], fps=FPS // 2, recipe=replace(recipe(), fps=FPS // 2, num_frames=5)
    )
    short = WanVideo(frames=video().frames[:, :1], fps=FPS, recipe=replace(recipe(), num_frames=1))
    small = WanVideo(
        frames=video().frames[:, :, ::2, ::2], fps=FPS, recipe=replace(recipe(), width=32, height=24)
    )
    found = wan22.grid([half, short, small, video()], ["a"] * 4, columns=4)
    frames = list(found.frames())
    assert len(frames) == 10 and found.fps == FPS
    label, whole = len(frames[0]) - CELL[1], video().as_uint8()[0]
    for t in (0, 3, 8):
        assert np.array_equal(cell(frames[t], 0, 0, label), whole[t - t % 2]), "at half the rate"
        assert np.array_equal(cell(frames[t], 1, 0, label), whole[0]), "the last frame stays"
        assert np.array_equal(cell(frames[t], 2, 0, label)[::2, ::2], whole[t][::2, ::2]), (
            "as large as the others"
        )
    assert np.array_equal(cell(frames[9], 3, 0, label), whole[8])


def test_saved_and_drawn(tmp_path):
    found = wan22.grid([with_seed(1), with_seed(2)])
    (path,) = found.save(tmp_path / "grid.mp4")
    information, frames = read(path)
    assert len(frames) == T and information["size"][0] == 2 * CELL[0]
    with pytest.raises(ValueError, match="carries no recipe"):
        read_recipe(path)
    with pytest.raises(FileExistsError):
        found.save(path)
    sheet = found.contact_sheet(columns=3, cell_width=2 * W)
    assert (
        isinstance(sheet, Image.Image)
        and sheet.width == 3 * (2 * W + 4)
        and sheet.height > 2 * (2 * H + 4) + 60
    )
    assert found.contact_sheet(prompt=False).height < found.contact_sheet().height
    assert "<video" in found._repr_html_()


def test_what_is_no_grid():
    with pytest.raises(ValueError, match="there are no videos"):
        wan22.grid([])
    with pytest.raises(ValueError, match=r"labels=\['a'\] has 1 for 2 videos"):
        wan22.grid([video(2)], ["a"])
    with pytest.raises(ValueError, match="columns=0 must be an int, at least 1"):
        wan22.grid([video()], columns=0)
