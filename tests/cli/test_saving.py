"""What cannot be saved where it should be is saved elsewhere, and two runs never take each other's file."""

import os
import re
import shutil
import signal
import stat
import tempfile
from functools import wraps
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from tests.cli.commands import QUICK, run
from tests.video.test_result import read
from wan22 import WanT2VPipeline, read_recipe
from wan22.cli import stopping
from wan22.pipelines.call.preview import Previewer
from wan22.video import writers


@pytest.fixture
def elsewhere(tmp_path_factory, monkeypatch):
    """A temporary folder and a home of the test's own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.setattr(Path, "home", lambda: folder / "home")
    return folder


@pytest.fixture
def sampled(monkeypatch):
    """Calls functions between sampling and saving."""
    functions = []
    plain = WanT2VPipeline.__call__

    @wraps(plain)
    def called(self, *args, **options):
        video = plain(self, *args, **options)
        for function in functions:
            function()
        return video

    monkeypatch.setattr(WanT2VPipeline, "__call__", called)
    return functions


def kept(err):
    """Return the file that an error says the frames are in."""
    return Path(re.search(r"the frames are in (\S+?)( and \d+ more)?$", err)[1])


def test_a_folder_that_is_gone(here, elsewhere, sampled):
    (here / "out").mkdir()
    sampled.append(lambda: (shutil.rmtree("out"), Path("out").touch()))
    _, err = run("t2v", "a", *QUICK, "--seed", 3, "-o", "out/a.mp4", code=1)
    assert "error: " in err and ".wan22-" not in err and "Traceback" not in err
    assert kept(err) == elsewhere / "tmp" / "a.mp4"
    assert len(read(kept(err))[1]) == 5 and read_recipe(kept(err)).seeds == (3,)


def ffmpeg(folder, script):
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_an_ffmpeg_that_fails(here, elsewhere, monkeypatch):
    script = "head -c 9 > /dev/null; echo '[libx264 @ 0x55] Error' >&2; exit 1"
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: ffmpeg(elsewhere, script))
    (elsewhere / "tmp" / "a.npy").touch()
    _, err = run("t2v", "a", *QUICK, "-o", "a.mp4", code=1)
    assert "error: a.mp4 could not be written whole: ffmpeg ended with status 1; the frames are in" in err
    assert "libx264" not in err
    assert kept(err) == elsewhere / "tmp" / "a-2.npy", "of a name that is free"
    assert np.load(kept(err)).shape == (5, 64, 64, 3)
    assert not list(here.iterdir())


def test_without_an_ffmpeg(here, elsewhere, monkeypatch):
    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    _, err = run("t2v", "a", *QUICK, "-o", "a.mp4", code=1)
    assert "No ffmpeg exe could be found" in err and kept(err).suffix == ".npy"


def test_a_temporary_folder_that_is_full_as_well(here, elsewhere, monkeypatch):
    write = writers.WRITERS[".gif"]

    def full(frames, path, *args, **options):
        if elsewhere / "home" not in path.parents:
            raise OSError(28, "No space left on device")
        return write(frames, path, *args, **options)

    monkeypatch.setitem(writers.WRITERS, ".gif", full)
    monkeypatch.setitem(writers.WRITERS, ".npy", full)
    _, err = run("t2v", "a", *QUICK, "-o", "a.gif", code=1)
    assert "a.gif could not be written" in err and "No space left on device" in err
    assert kept(err) == elsewhere / "home" / "a.gif"


def test_a_series_of_pngs_is_whole_or_not_there(here, elsewhere, monkeypatch):
    from PIL import Image

    save, written = Image.Image.save, []

    def fails(self, path, *args, **options):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return save(self, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", fails)
    _, err = run("t2v", "a", *QUICK, "-o", "a.png", code=1)
    assert "a-0003.png could not be written whole: No space left on device" in err
    assert not list(here.iterdir())
    assert kept(err) == elsewhere / "tmp" / "a-0001.png" and err.endswith("and 4 more")


def test_a_name_that_another_run_took_meanwhile(here, elsewhere, sampled):
    sampled.append(lambda: Path("a.mp4").write_text("another's"))
    _, err = run("t2v", "a", *QUICK, "-o", "a.mp4", code=1)
    assert "error: a.mp4 exists" in err and "--overwrite replaces it" in err
    assert "overwrite=True" not in err
    assert Path("a.mp4").read_text() == "another's", "neither video is lost"
    assert len(read(kept(err))[1]) == 5


# ---- signals ----


@pytest.fixture
def terminated(monkeypatch):
    """Sends SIGTERM from the preview after the first step."""
    step = Previewer.step

    def killed(self, i, *rest):
        step(self, i, *rest)
        if i == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Previewer, "step", killed)
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_with_the_step_and_keeps_what_there_is(terminated, here):
    slow = ["--steps", 4, "--frames", 5, "--preview", "p.png", "--preview-every", 1]
    out, err = run("t2v", "a", *slow, "-o", "a.mp4", code=130)
    assert out == "a.mp4\n" and "stopped after step 1 of 4" in err
    assert read_recipe("a.mp4").steps_done == 1
    assert sorted(path.name for path in here.iterdir()) == ["a.mp4", "p.png"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_a_video_is_saved(times, here, monkeypatch):
    plain = writers.WRITERS[".mp4"]

    def interrupted(frames, *args, **options):
        def sent():
            for i, frame in enumerate(frames):
                for _ in range(times if i == 2 else 0):
                    os.kill(os.getpid(), signal.SIGINT)
                yield frame

        return plain(sent(), *args, **options)

    monkeypatch.setitem(writers.WRITERS, ".mp4", interrupted)
    _, err = run("t2v", "a", *QUICK, "-o", "a.mp4", code=0 if times == 1 else 130)
    assert [path.name for path in here.iterdir()] == (["a.mp4"] if times == 1 else [])
    assert ("error: interrupted" in err) == (times == 2)


def test_sigterm_before_there_is_anything_to_save(here):
    with pytest.raises(KeyboardInterrupt), stopping.until_terminated():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.until_terminated():
            os.kill(os.getpid(), signal.SIGHUP)  # as after nohup
    finally:
        signal.signal(signal.SIGHUP, before)
