"""A folder of small videos with captions, made by wan22's own writer."""

import pytest

from tests.videos import frames_of
from wan22.video.writers import write_encoded


@pytest.fixture
def clips(tmp_path):
    """Two videos of 9 and 5 frames, 64x48 and 48x64, and a picture, with captions."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write_encoded(iter(frames_of(9, 64, 48)), folder / "wide.mp4", 8)
    write_encoded(iter(frames_of(5, 48, 64, seed=1)), folder / "tall.mp4", 8)
    for name in ("wide", "tall"):
        (folder / f"{name}.txt").write_text(f"a {name} thing moves\n")
    return folder
