"""What `--help` says is true: its examples run, and every command has the same switches."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import QUICK, picture, run
from tests.videos import frames_of
from wan22 import tiny_checkpoint
from wan22.checkpoints.converting.convert import convert
from wan22.cli import options, signatures
from wan22.cli.app import app
from wan22.pipelines.loading import preparing
from wan22.presets import PRESETS
from wan22.video.writers import write_encoded

TINY = tiny_checkpoint("t2v")
COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}
EXAMPLES = [
    line.strip()
    for function in COMMANDS.values()
    for line in function.__doc__.splitlines()
    if line.strip().startswith("wan22 ")
]
# Of released checkpoints these would download: they are only planned.
MAKING = {"t2v", "i2v", "batch", "reproduce"}


@pytest.fixture
def files(here, monkeypatch):
    """The files that the examples name."""
    for name in ("shapes.png", "cat.jpg", "asleep.jpg"):
        picture(name, (64, 64))
    (here / "clips").mkdir()
    write_encoded(iter(frames_of(5)), here / "clips" / "a.mp4", 8)
    (here / "clips" / "a.txt").write_text("a red circle")
    (here / "clips.toml").write_text('[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [5]\n')
    (here / "prompts.jsonl").write_text('{"prompt": "a red circle grows", "num_inference_steps": 1}')
    shutil.copy(next((TINY / "transformer").glob("*.safetensors")), "high_noise_model.safetensors")
    monkeypatch.setattr(preparing, "bytes_to_download", lambda *_: 10**9)
    return here


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_stands(example, files, monkeypatch):
    _, command, *arguments = shlex.split(example)
    if command in ("reproduce", "info"):
        run("t2v", "a", *QUICK, "-o", "cats.mp4", "-q")
    if command == "convert":
        convert(TINY, arguments[0], "official")
    if command in ("download", "prepare"):  # all that is checked before weights are fetched
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        _, err = run(command, *arguments, code=1)
        assert "nobody can be asked here" in err or "HF_HUB_OFFLINE=1 forbids to ask the hub" in err
        return
    if command == "train":  # all that is checked before anything is loaded
        (files / "style.toml").write_text('model = "tiny-t2v"\ndata = "cached"\noutput = "runs"\n')
        _, err = run(command, *arguments, code=1)
        assert "the folder of encoded clips cached is not there" in err
        return
    if "--lora" in arguments:  # a person's own file
        (files / "style.safetensors").touch()
        run(command, *arguments, "--dry-run", code=1)
        return
    released = any(preset.name in arguments for preset in PRESETS if preset.repo)
    run(command, *arguments, *(["--dry-run"] if command in MAKING and released else []))


def test_each_command_has_an_example():
    assert {example.split()[1] for example in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    out, _ = run(command, "--help")
    assert "bool" not in out
    for flag in ("--json", "--quiet", "--verbose"):
        assert flag in out


def test_the_help_has_the_defaults_of_each_checkpoint():
    out = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("t2v", "--help")[0]).split())
    assert "Default: 40 (T2V-A14B); 50 (TI2V-5B, 2.1-T2V-1.3B, 2.1-T2V-14B)" in out
    assert "12 is short for" in out
    assert options._defaults("seed", PRESETS) == ""


def test_channels_are_those_of_the_presets():
    assert {c for channels in signatures.CHANNELS.values() for c in channels} == {
        p.in_channels for p in PRESETS
    }


def started(*arguments, **environment):
    """Run the command line in a process of its own; return stdout and stderr."""
    command = [sys.executable, "-m", "wan22.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_first_line_waits_for_no_library(here):
    code = (
        "import sys\n"
        "from wan22.cli import main, running\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}\n"
        "running.say = lambda line: (print(line, sorted(heavy & set(sys.modules))), sys.exit())\n"
        "main(['t2v', 'a', '--model', 'Wan2.2-T2V-A14B'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "checking Wan2.2-T2V-A14B []\n"


def test_in_ascii_and_in_a_pipe(here):
    """No bar is drawn, no path folded, and no character refused."""
    place = Path("a-folder-with-a-name-that-is-long-enough-to-be-folded") / "and-another-one" / "v.mp4"
    ascii_only = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    out, err = started("t2v", "两只猫 – a cat", *QUICK, "-o", place, **ascii_only)
    assert out.decode("ascii") == f"{place}\n"
    lines = err.decode("ascii").splitlines()
    assert lines[1].startswith("64x64, 5 frames at 8 fps (0.62 s), 2 steps") and lines[1].endswith(
        f", to {place}"
    )
    assert not [line for line in lines if "%|" in line or "\r" in line or "it/s" in line], lines
    out, _ = started("info", place, **ascii_only)
    assert "\\u4e24\\u53ea\\u732b - a cat" in out.decode("ascii")
    out, _ = started("models", **ascii_only)
    assert "Wan-AI/Wan2.2-T2V-A14B-Diffusers" in out.decode("ascii")


def test_a_verbose_command_says_what_is_logged(here):
    _, err = run("t2v", "a", *QUICK, "-o", "a.mp4", "--verbose")
    assert "2 steps of" in err and "seed" in err
    _, err = run("t2v", "a", *QUICK, "-o", "b.mp4", "--quiet")
    assert err == ""
