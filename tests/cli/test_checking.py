"""What is wrong with a command is said before anything is loaded or downloaded."""

import shutil
from functools import cache

import pytest

from tests.cli.commands import picture, run
from wan22.cli import loading, running
from wan22.pipelines.loading import official_layout


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Fails where weights are loaded, or a server is asked."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a server was asked"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a server was looked up"))
    monkeypatch.setattr(running, "load", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(official_layout, "outline_of", outline)


def outline(preset, _):
    """The models of a release; their dtype plays no part here."""
    return models_of(preset)


models_of = cache(official_layout.released_models)


RELEASE = ["--model", "Wan-AI/Wan2.2-T2V-A14B"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.txt"], "a.txt must end in .mp4"),
        (["-o", "taken.mp4"], "taken.mp4 exists; --overwrite replaces it"),
        (["-o", "taken.mp4/a.mp4"], "taken.mp4 is a file, not a folder"),
        (["-o", "folder.mp4"], "folder.mp4 is a folder; give a file's name"),
        (["-o", "folder.mp4", "--overwrite"], "folder.mp4 is a folder; give a file's name"),
        (["-o", "a.mp4", "--contact-sheet"], "a-sheet.png exists; --overwrite replaces it"),
        (["--frames", 80], "--num-frames 80 must be an int, 1 + a multiple of 4; the nearest are 77 and 81"),
        (["--height", 725], "--height 725 must be an int, a positive multiple of 16; the nearest are 720"),
        (["--steps", 0], "--steps 0 must be an int, at least 1"),
        (["--seed", -1], "--seed -1 must be an int"),
        (["-g", 0.5], "--guidance-scale 0.5 must be a number, 1 or more"),
        (["--sigmas", "2,1"], "sigmas"),
        (["--num-videos", 0], "--num-videos 0 must be an int"),
        (["--negative-prompt", "x", "--max-sequence-length", 600], "--max-sequence-length 600 must be"),
        (["--lora", "gone.safetensors"], "gone.safetensors"),
        (["--lora", "no-lora.safetensors"], "no-lora.safetensors"),
        (["--lora-high", "gone.safetensors"], "gone.safetensors"),
        (["--attention-backend", "flash9"], "'flash9' cannot be used on cpu"),
        (["--attention", "sparge"], "--attention sparge cannot be used on cpu in torch.bfloat16 with 128"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--quantize", "q4"], "q4"),
        (["--quantize", "fp8:lo"], "--quantize fp8:lo: lo is not known there"),
        (["--quantize", "int8", "--prepare", "fp8"], "--quantize int8: --prepare fp8 is quantised already"),
        (["--memory", "lots"], "--memory lots must be at least one byte, written as '12GB'"),
        (["--memory", "12"], "--memory 12GB is a GPU's, and there is no CUDA device here"),
        (["--parallel", "cfg=2"], "--parallel cfg=2 is for several ranks"),
        (["--preview", "x.bmp"], "x.bmp must end in"),
        (["--preview", "x.png", "--preview-every", 0], "--preview-every 0 must be"),
        (["--vae", "gone.pth"], "--vae goes with a --model that is a file"),
    ],
)
def test_a_release_is_not_downloaded_for_a_mistake(arguments, message, here):
    (here / "taken.mp4").touch()
    (here / "a-sheet.png").touch()
    (here / "no-lora.safetensors").write_text("no LoRA")
    (here / "folder.mp4").mkdir()
    before = sorted(here.rglob("*"))
    _, err = run("t2v", "x", *RELEASE, *arguments, code=1)
    assert message in err[err.index("error: ") :]
    assert "Traceback" not in err and sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["t2v", "x", "--model", "Wan2.2-TI2V-5B", "--height", 720],
            "a positive multiple of 32; the nearest",
        ),
        (["t2v", "x", "--model", "Wan2.2-TI2V-5B", "--guidance-scale-2", 3], "use --guidance-scale"),
        (["t2v", "x", "--model", "Wan2.2-I2V-A14B"], "use wan22 i2v"),
        (["i2v", "a.png", "x", "--model", "Wan2.2-T2V-A14B"], "use wan22 t2v"),
        (["i2v", "no.png", "x", "--model", "Wan2.2-I2V-A14B"], "no.png is not an image that is read"),
        (["i2v", "gone.png", "x", "--model", "Wan2.2-I2V-A14B"], "there is no file gone.png"),
        (["i2v", "a.png", "x", "--model", "Wan2.2-I2V-A14B", "--last-image", "no.png"], "no.png"),
        (["i2v", "a.png", "x", "--model", "Wan2.2-TI2V-5B", "--last-image", "a.png"], "last"),
        (["i2v", "a.png", "x", "--fit", "squeeze"], "--fit squeeze must be one of 'crop', 'pad', 'stretch'"),
        (["i2v", "tiny.png", "x", "--model", "Wan2.2-I2V-A14B"], "has 8x8 pixels; each side must have"),
        (
            ["t2v", "x", "--model", "Wan2.2-T2V-A14B", "--frames", "4001", "-o", "a.npy"],
            "takes about 44.2 GB",
        ),
    ],
)
def test_what_depends_on_the_model(arguments, message, here, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**10))
    picture("a.png")
    picture("tiny.png", (8, 8))
    (here / "no.png").write_text("no picture")
    _, err = run(*arguments, code=1)
    assert message in err[err.index("error: ") :]


def test_a_number_alone_is_gigabytes():
    assert loading.parse_memory("12") == loading.parse_memory("12GB") == "12GB"
    assert loading.parse_memory("11.5") == "11.5GB"
    assert loading.parse_memory("12000000000") == "12000000000", "bytes, as in Python"
    assert loading.parse_memory("auto") == "auto" and loading.parse_memory(None) is None


def test_a_release_is_known_by_each_of_its_names():
    for name in ("Wan2.2-T2V-A14B", "wan-ai/wan2.2-t2v-a14b", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"):
        assert loading.preset_of(name, "t2v").name == "Wan2.2-T2V-A14B"
    assert loading.preset_of("somebody/Wan2.2-T2V-A14B", "t2v") is None
    assert loading.preset_of("", "t2v") is None and loading.preset_of(None, "i2v").name == "tiny-i2v"
