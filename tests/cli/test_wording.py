"""Messages of the command line name its flags, not Python's arguments."""

import pytest

from tests.cli.commands import run
from wan22.cli.wording import in_flags

FLAGS = {
    "seed": "--seed",
    "overwrite": "--overwrite",
    "num_frames": "--num-frames",
    "guidance_scale": "--guidance-scale",
    "guidance_scale_2": "--guidance-scale-2",
    "memory": "--memory",
    "quantize": "--quantize",
    "noise_device": "--noise-device",
}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("seed=-1 must be an int", "--seed -1 must be an int"),
        ("a.mp4 exists; overwrite=True replaces it", "a.mp4 exists; --overwrite replaces it"),
        ("leave num_frames out", "leave --num-frames out"),
        (
            "memory='auto' plans; quantize=\"fp8\" takes less",
            "--memory auto plans; --quantize fp8 takes less",
        ),
        ("guidance_scale_2=1.5 is; use guidance_scale", "--guidance-scale-2 1.5 is; use --guidance-scale"),
        ("vram='1KB' must be", "--memory 1KB must be"),
        ("noise_device='a b' is not there", '--noise-device "a b" is not there'),
        ("give memory=, such as", "give --memory, such as"),
        ("use WanI2VPipeline", "use wan22 i2v"),
        # Names of files, and parts of other names, stay.
        ("/a/num_frames.txt and my-seed=1, x.seed=2", "/a/num_frames.txt and my-seed=1, x.seed=2"),
        ("there is no file seed", "there is no file seed"),
    ],
)
def test_in_flags(message, words):
    assert in_flags(message, FLAGS) == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "a", "b", "--to", "disk"], "--to disk must be one of"),
        (["t2v", "x", "--noise-device", "cuda:99"], "--noise-device cuda:99 is not there"),
        (["t2v", "x", "--distilled", "lightning-4", "--steps", 4], "--distilled lightning-4 has its own"),
        (["t2v", "x", "--distilled", "lightning-4", "--steps", 4], "leave --steps out"),
        (["t2v", "x", "--crf", 20, "-o", "a.gif"], "--crf 20 is for .mp4"),
    ],
)
def test_errors_of_the_library(arguments, message, here):
    (here / "a").mkdir()
    assert message in run(*arguments, code=1)[1]
