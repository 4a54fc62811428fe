"""Every example runs, as a user would paste it, and writes what it says."""

import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_text_to_video(tmp_path):
    run = subprocess.run(
        [sys.executable, EXAMPLES / "text_to_video.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    clip, sheet = (
        Path(re.search(rf"^{name}: +(.+)$", run.stdout, re.M)[1]) for name in ("video", "contact sheet")
    )
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / clip))
    assert (frames, round(seconds, 2)) == (17, 17 / 8 // 0.01 / 100)
    assert Image.open(tmp_path / sheet).width > 64 * 8
    assert "tiny-t2v" in run.stdout
    assert "a red circle moves to the right on a blue background" in run.stdout
    assert "100%" in run.stderr  # the progress bar


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_what_a_user_would_paste(script):
    assert len(script.read_text().splitlines()) <= 50
