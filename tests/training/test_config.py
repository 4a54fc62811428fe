"""Settings: the same in Python, TOML and as flags; each breach of a rule names it."""

import dataclasses
import inspect
import json
import re

import pytest

from tests.cli.commands import run
from tests.training.conftest import settings
from wan22.cli.options import TrainingOptions
from wan22.training.config import FREE, TrainConfig, read_config

pytestmark = pytest.mark.usefixtures("encoded")

NEEDED = {"model": "m", "data": "d", "output": "o"}


def test_toml_gives_back_what_was_written(tmp_path):
    config = settings(tmp_path, alpha=3.5, name='a "b" é', validation=None, sample_every=3)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert read_config(file) == config
    assert read_config(file, rank=7, seed=1) == config.changed(rank=7, seed=1)


def test_every_setting_is_described_and_is_a_flag():
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert names == re.findall(r"^    (\w+): ", inspect.getdoc(TrainConfig), re.MULTILINE)
    parameters = TrainingOptions().parameters
    assert [parameter.name for parameter in parameters] == names
    for parameter in parameters:
        help = parameter.annotation.__metadata__[-1].help
        assert help[0] == help[0].upper() and not re.search(r"\b[a-z]+_[a-z_]+\b", help), help
    assert set(names) >= FREE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is not given"),
        ({"rank": 0}, "rank=0 must be an int, at least 1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"learning_rate": 0}, "learning_rate=0 must be a number, above 0"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' must be a number"),
        ({"dropout": 1}, "dropout=1 would leave nothing to train"),
        ({"caption_dropout": -0.1}, "caption_dropout=-0.1.*nearest is 0"),
        ({"method": "lorra"}, "method='lorra' must be one of 'lora'.*nearest is 'lora'"),
        ({"expert": "medium"}, "expert='medium' must be one of 'both', 'high', 'low'"),
        ({"targets": "("}, r"targets='\(' must be all, attention.*regular expression"),
        ({"steps": 5, "warmup": 5}, "warmup=5 must be below steps=5"),
        ({"method": "full", "quantize": "fp8"}, "quantize='fp8' is for frozen weights"),
        ({"name": "a/b"}, "name='a/b' is the beginning of file names"),
        ({"seed": -1}, "seed=-1"),
        ({"checkpointing": 1}, "checkpointing=1 must be true or false"),
        ({"data": 3}, "data=3 must be text"),
        ({"shift": float("nan")}, "shift=nan"),
        ({"tracker": 5}, "tracker=5 must be text"),
    ],
)
def test_rules_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(**NEEDED | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak = 3", "has no argument rnak; the nearest is rank"),
        ("[training]\nrank = 3", "training must be one value; a training has no tables"),
        ("rank = ", "is not TOML"),
        ("rank = 0", "config.toml: rank=0 must be"),
        (b"\xff\xfe", "is not TOML: it is not text in UTF-8"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_it(text, message, tmp_path):
    file = tmp_path / "config.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_config(file, **NEEDED)
    assert "config.toml" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "none.toml")


def test_the_command_trains(tmp_path):
    file = tmp_path / "style.toml"
    file.write_text('model = "tiny-t2v"\nrank = 2\nsteps = 9\nexpert = "low"\n')
    out = tmp_path / "out"
    options = ["--data", "t2v-3", "-o", out, "--steps", 2, "--dtype", "fp32", "--device", "cpu", "--json"]
    found = json.loads(run("train", file, *options)[0])
    assert found["steps"] == 2 and list(found["files"]) == ["transformer_2"]
    assert (out / "lora_low_noise.safetensors").is_file()
    again = [*options, "--steps", 3]
    assert "saved at step 2; resume it (--resume)" in run("train", file, *again, code=1)[1]
    assert json.loads(run("train", file, *again, "--resume")[0])["steps"] == 3


def test_the_command_draws_noise_levels():
    text = run("train", "--model", "tiny-t2v", "--show-timesteps")[0]
    assert "high noise: timesteps of 4096 samples" in text and "low noise" in text and "█" in text
    found = json.loads(run("train", "--model", "tiny-t2v", "--show-timesteps", "--json")[0])
    high, low = found["histogram"].values()
    assert sum(high) == sum(low) == found["samples"] and not any(high[:17]) and not any(low[18:])
