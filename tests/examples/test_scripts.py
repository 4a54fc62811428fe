"""Every example runs, as a user would paste it, and writes what it says."""

import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *options, folder):
    """Run an example in a folder; return what it printed, and the paths of its video and contact sheet."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *options], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "100%" in done.stderr  # the progress bar
    names = (re.search(rf"^{name}: +(.+)$", done.stdout, re.M)[1] for name in ("video", "contact sheet"))
    return done.stdout, *(folder / name for name in names)


def check_video(clip, sheet):
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(clip))
    assert (frames, round(seconds, 2)) == (17, 17 / 8 // 0.01 / 100)
    assert Image.open(sheet).width > 64 * 8


def test_text_to_video(tmp_path):
    printed, clip, sheet = run("text_to_video.py", folder=tmp_path)
    check_video(clip, sheet)
    assert "tiny-t2v" in printed
    assert "a red circle moves to the right on a blue background" in printed


def test_image_to_video(tmp_path):
    """It draws its image where none is given; the clip starts with it."""
    printed, clip, sheet = run("image_to_video.py", folder=tmp_path)
    check_video(clip, sheet)
    assert "tiny-i2v" in printed
    drawn = Image.open(tmp_path / "outputs/image.png")
    reader = imageio_ffmpeg.read_frames(str(clip))
    size = next(reader)["size"]
    first = Image.frombytes("RGB", size, next(reader))
    difference = np.asarray(first, float) - np.asarray(drawn.resize(size))
    assert np.abs(difference).mean() < 12

    drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mine.jpg")
    options = ("mine.jpg", "--prompt", "a white triangle stays still on a blue background")
    printed, clip, sheet = run("image_to_video.py", *options, "--output", "mine.mp4", folder=tmp_path)
    check_video(clip, sheet)
    assert (tmp_path / "mine.mp4").exists()
    assert "mine.jpg" in printed


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_what_a_user_would_paste(script):
    assert len(script.read_text().splitlines()) <= 50
