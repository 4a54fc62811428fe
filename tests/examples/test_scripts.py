"""Every example runs, as a user would paste it, and writes what it says."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.accel.parallel.ranks import environment, torchrun
from wan22 import read_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs an example in `tmp_path`, in this process, which has all imported already.

    It returns what was printed, and the paths of the video and the contact sheet that this names.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return printed_paths(capsys.readouterr().out, tmp_path)

    return run


def printed_paths(printed, folder):
    names = (re.search(rf"^{name}: +(.+)$", printed, re.M) for name in ("video", "contact sheet"))
    return printed, *(folder / name[1] if name else None for name in names)


def check_video(clip, sheet):
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(clip))
    assert (frames, round(seconds, 2)) == (17, 17 / 8 // 0.01 / 100)
    assert Image.open(sheet).width > 64 * 8


def test_text_to_video(tmp_path):
    """In a process of its own, as a user starts it."""
    command = [sys.executable, EXAMPLES / "text_to_video.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    printed, clip, sheet = printed_paths(done.stdout, tmp_path)
    check_video(clip, sheet)
    assert "tiny-t2v" in printed
    assert "a red circle moves to the right on a blue background" in printed


def test_image_to_video(run, tmp_path):
    """It draws its image where none is given; the clip starts with it."""
    printed, clip, sheet = run("image_to_video.py")
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
    printed, clip, sheet = run("image_to_video.py", *options, "--output", "mine.mp4")
    check_video(clip, sheet)
    assert (tmp_path / "mine.mp4").exists()
    assert "mine.jpg" in printed


def test_low_memory(run):
    printed, clip, sheet = run("low_memory.py")
    check_video(clip, sheet)
    assert "host peak" in printed
    assert read_recipe(clip).changes == {
        "quantized": {"transformer": {"int8": 60}, "transformer_2": {"int8": 60}}
    }


def test_lora(run, tmp_path):
    """At full strength the red circle is purple."""
    run("lora.py")
    colours = {}
    for name in ("off", "full"):
        clip = tmp_path / f"outputs/lora-{name}.mp4"
        check_video(clip, clip.with_suffix(".png"))
        reader = imageio_ffmpeg.read_frames(str(clip))
        next(reader)
        frame = np.frombuffer(next(reader), np.uint8).reshape(64, 64, 3).astype(int)
        disc = frame[frame[..., 0] > 120]
        colours[name] = disc.mean(axis=0)
    assert colours["full"][2] > colours["off"][2] + 80, "more blue in it"
    assert read_recipe(tmp_path / "outputs/lora-full.mp4").loras


def test_few_steps(run):
    _, clip, sheet = run("few_steps.py")
    check_video(clip, sheet)
    assert read_recipe(clip).distilled == "lightning-4"


def test_batch(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle grows\na blue square moves up\n")
    run("batch.py", "prompts.txt", "--seeds", "5")
    files = sorted((tmp_path / "outputs/batch").glob("*.mp4"))
    assert [read_recipe(file).seeds for file in files] == [(5,), (5,)]


def test_first_last_frame(run):
    _, clip, sheet = run("first_last_frame.py")
    check_video(clip, sheet)
    assert len(read_recipe(clip).last_image) == 1


def test_preview(run, tmp_path):
    _, clip, sheet = run("preview.py")
    check_video(clip, sheet)
    assert Image.open(tmp_path / "outputs/preview-now.gif").n_frames == 5
    assert Image.open(tmp_path / "outputs/preview-step20.png").width >= 256


@pytest.mark.slow
def test_multi_gpu(run, tmp_path):
    """On two ranks it makes the video of one, which is told and written once."""
    _, clip, sheet = run("multi_gpu.py", "--output", "one.mp4")
    command = [*torchrun(2), EXAMPLES / "multi_gpu.py", "--ulysses", "2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.count("video:") == 1 and "2 ranks: ulysses 2, VAE rows" in done.stdout
    check_video(tmp_path / "outputs/multi_gpu.mp4", tmp_path / "outputs/multi_gpu.png")
    sheets = [np.asarray(Image.open(path), int) for path in (sheet, tmp_path / "outputs/multi_gpu.png")]
    one, two = (rows[-196:] for rows in sheets)  # the frames, below a caption with the seconds
    assert one.shape == two.shape and np.abs(one - two).max() <= 1
    assert read_recipe(clip).seeds == read_recipe(tmp_path / "outputs/multi_gpu.mp4").seeds


@pytest.mark.slow
def test_many_machines(tmp_path):
    """Two workers share the prompts; a second start makes what is missing."""
    prompts = ["a red circle grows", "a blue square moves up", "a green circle grows"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    command = [sys.executable, EXAMPLES / "many_machines.py", "prompts.txt", "--workers", "2"]

    def start():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout, re.findall(r"(\d+)\.mp4 by (\w+): (.+)", done.stdout)

    printed, made = start()
    assert "3 prompts, 0 of them done already" in printed
    assert sorted(number for number, _, _ in made) == ["001", "002", "003"]
    assert len({maker for _, maker, _ in made}) == 2
    files = sorted((tmp_path / "outputs/many_machines").glob("*"))
    assert [read_recipe(file).prompts[0] for file in files] == prompts
    files[1].unlink()
    printed, made = start()
    assert "3 prompts, 2 of them done already" in printed
    assert [(number, prompt) for number, _, prompt in made] == [("002", "a blue square moves up")]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_what_a_user_would_paste(script):
    lines = 150 if script.name == "app.py" else 50  # a page has its layout, too
    assert len(script.read_text().splitlines()) <= lines
