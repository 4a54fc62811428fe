"""Two results beside each other: settings, frames, seconds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.video.test_result import FPS, T, recipe, video
from wan22 import WanVideo


def changed(difference, **settings):
    frames = video().frames.copy()
    frames[0, 2] = np.clip(frames[0, 2] + np.float32(difference), 0, 1)
    return WanVideo(frames=frames, fps=FPS, recipe=replace(recipe(), **settings))


def test_the_numbers():
    plain, other = video(), changed(0.05, num_inference_steps=4)
    found = plain.compare(other)
    difference = other.frames.astype(np.float64) - plain.frames
    expected = -10 * math.log10(np.square(difference).mean())
    assert found.psnr == pytest.approx(expected) and found.max_abs == pytest.approx(np.abs(difference).max())
    (frames,) = found.psnr_of_frames
    assert len(frames) == T and [math.isinf(value) for value in frames] == [t != 2 for t in range(T)]
    assert str(found) == (
        f"1: 2 steps\n2: 4 steps\nPSNR {expected:.1f} dB, largest difference 0.05 (12.8 of 255)"
    )
    assert len(list(found.frames())) == T and found.columns == 2


def test_equal_frames_and_times():
    plain, other = video(), video()
    plain.seconds, other.seconds = 4.0, 1.0
    found = plain.compare(other, ["exact", "fast"])
    assert (found.psnr, found.max_abs) == (math.inf, 0)
    assert str(found) == "1: exact\n2: fast\nequal frames\nthe second took 0.25 of the first's time"


def test_types_of_frames():
    plain = video()
    eight_bits = WanVideo(frames=plain.frames.copy(), fps=FPS, recipe=recipe())
    eight_bits.frames = [[*map(np.asarray, clip)] for clip in plain.as_uint8()]
    assert 0 < plain.compare(eight_bits).max_abs <= 1 / 255
    as_tensor = WanVideo(
        frames=torch.from_numpy(plain.frames).permute(0, 1, 4, 2, 3), fps=FPS, recipe=recipe()
    )
    assert plain.compare(as_tensor).max_abs == 0


def test_what_has_no_numbers():
    found = video().compare(video(height=24))
    assert found.psnr is None and found.max_abs is None and "of different sizes" in str(found)
    with pytest.raises(ValueError, match="1 videos cannot be compared with 2"):
        video().compare(video(2))
    assert video(2).compare(video(2)).columns == 2
