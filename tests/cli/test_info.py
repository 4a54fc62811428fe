"""What a video, a checkpoint and a name stand for, and converting."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.commands import QUICK, run
from tests.video.test_recipe import KNOWN, carried
from wan22 import tiny_checkpoint
from wan22.cli.reporting import ToStderr


def test_the_recipe_of_a_video(here):
    run("t2v", "a [bold] cat", *QUICK, "--seed", 5, "-o", "a.mp4", "-q")
    out, _ = run("info", "a.mp4")
    assert re.search(r"prompt\s+a \[bold\] cat", out) and re.search(r"seed\s+5", out)
    assert json.loads(run("info", "a.mp4", "--json")[0])["call"]["prompt"] == ["a [bold] cat"]


def test_what_a_checkpoint_is(here):
    found = json.loads(run("info", tiny_checkpoint(), "--json")[0])
    assert (found["layout"], found["variant"], found["experts"]) == ("Diffusers", "tiny-t2v", 2)
    assert found["loads with"].startswith("WanT2VPipeline.from_pretrained(")
    assert set(found["models"]) == {"transformer", "transformer_2", "vae", "text_encoder"}
    assert next(iter(found["models"]["transformer"]["dtypes"])) == "bfloat16"
    file = tiny_checkpoint() / "vae" / "diffusion_pytorch_model.safetensors"
    found = json.loads(run("info", file, "--json")[0])
    assert found["models"]["vae"]["kind"] == "vae"
    assert found["loads with"].startswith("AutoencoderKLWan.from_single_file(")
    assert "tiny-t2v" in run("info", tiny_checkpoint())[0]
    broken = load_file(file)
    broken["mystery.weight"] = broken.pop("post_quant_conv.weight")
    save_file(broken, here / "broken.safetensors")
    _, err = run("info", "broken.safetensors", code=1)
    assert "mystery.weight" in err


ODD = "\x1b]0;pwned\x07 [/x] \\[/red] \x9b31m \u202e \ud800"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_a_strangers_recipe_says_is_shown_and_not_obeyed(options, here):
    recipe = {**KNOWN, "checkpoint": ODD, "versions": {ODD: ODD}, "call": {**KNOWN["call"], "prompt": [ODD]}}
    recipe["changes"] = {"many": list(range(10**5))}
    recipe["call"]["sigmas"] = [1.0] * 10**5
    out, _ = run("info", carried(recipe, here), *options)
    assert not set(out) & {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"}
    assert "[/x]" in out
    if options:
        assert json.loads(out)["checkpoint"] == ODD and len(json.loads(out)["call"]["sigmas"]) == 10**5
    else:
        assert len(out) < 20_000 and "… and 99800 more" in out


def test_what_files_names_and_tensors_say_is_shown_and_not_obeyed(here):
    name = "a\x1b]0;pwned\x07[/x]\\[/x]"
    save_file({name: torch.zeros(1)}, here / "w.safetensors")
    for arguments in (
        ["info", "w.safetensors"],
        ["info", name],
        ["reproduce", name],
        ["t2v", "a", "-m", name],
    ):
        _, err = run(*arguments, code=1)
        assert "[/x]" in err and "\\x1b]0;" in err and not set(err) & {"\x1b", "\x07"}


def test_log_messages_are_not_obeyed(capsys):
    ToStderr().handle(logging.LogRecord("a", logging.WARNING, "", 1, "%s\nb", ("\x1b[31m",), None))
    assert capsys.readouterr().err == "\\x1b[31m\nb\n"


def test_names(here):
    assert json.loads(run("info", "Wan2.2-T2V-A14B", "--json")[0])["transformers"] == 2
    out, _ = run("models")
    assert "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in out and "Apache-2.0" in out and "tiny-i2v" in out
    assert {m["name"] for m in json.loads(run("models", "--json")[0])} >= {"Wan2.2-T2V-A14B", "tiny-t2v"}


def test_converting(here):
    heads = ["--attention-head-dim", 64]
    out, _ = run("convert", tiny_checkpoint(), "out", "--to", "official", "--dry-run", *heads)
    assert "GB, in" in out and not (here / "out").exists()
    run("convert", tiny_checkpoint(), "out", "--to", "official", *heads)
    assert (here / "out" / "high_noise_model").is_dir()
    _, err = run("convert", tiny_checkpoint(), "out", "--to", "official", code=1)
    assert "out" in err
    _, err = run("convert", tiny_checkpoint(), "o", "--to", "disk", code=1)
    assert "--to disk must be one of" in err


def test_what_a_lora_is_and_was_trained_on(here):
    """Of any dialect; what its header says of its training is shown."""
    down, up = torch.zeros(4, 128), torch.zeros(128, 4)
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.ones(()),
    }
    save_file(tensors, here / "style.safetensors", {"ss_steps": "300", "modelspec.title": "st\x1byle"})
    found = json.loads(run("info", "style.safetensors", "--json")[0])
    assert (found["kind"], found["layers"], found["ranks"]) == ("LoRA", 1, [4])
    assert found["training"]["ss_steps"] == "300"
    out, _ = run("info", "style.safetensors")
    assert re.search(r"ss_steps:\s+300", out) and "\x1b" not in out
