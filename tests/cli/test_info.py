"""What a video, a checkpoint and a name stand for, and converting."""

import json
import re

from safetensors.torch import load_file, save_file

from tests.cli.commands import QUICK, run
from wan22 import tiny_checkpoint


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
    assert "'disk'" in err
