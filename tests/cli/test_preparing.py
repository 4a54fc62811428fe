"""`wan22 prepare`: sizes first, a question, and what the answers do."""

import json
import shutil

import pytest
import torch
import typer

from tests.builders import load_pipeline
from tests.cli.commands import run
from tests.pipelines.loading.repositories import make_repository
from wan22 import WanTransformer3DModel
from wan22.cli import downloading, preparing
from wan22.pipelines.loading import preparing as of_pipelines

DTYPES = {"default": torch.bfloat16, "vae": torch.float32}


def folders(cache):
    return sorted(path.name.rpartition("-")[0] for path in cache.glob("*-*"))


def test_preparing(saved, cache):
    out, err = run("prepare", saved, "--yes")
    assert folders(cache) == ["text_encoder-bf16", "transformer-bf16", "transformer-bf16"]
    assert sorted(out.split()) == sorted(map(str, cache.glob("*-*")))
    for words in ("component stored prepared", "transformer_2", "GB float32", "GB bf16", "GB are free in"):
        assert words in err
    pipe = load_pipeline(saved, dtype=DTYPES)
    assert pipe.transformer.dtype == torch.bfloat16
    out, err = run("prepare", saved)  # nothing to ask
    assert err.count("there already") == 3 and len(out.split()) == 3


def test_json(saved, cache):
    out, _ = run("prepare", saved, "--dtype", "fp8", "--yes", "--json")
    found = json.loads(out)["prepared"]
    forms = {entry["component"]: entry["form"] for entry in found}
    assert forms == {"transformer": "fp8", "transformer_2": "fp8", "text_encoder": "bf16"}
    assert {entry["folder"] for entry in found} == {str(path) for path in cache.glob("*-*")}


def test_without_a_terminal_it_needs_yes(saved, cache):
    _, err = run("prepare", saved, code=1)
    assert "error: write 0.000" in err and f"to {cache}: nobody can be asked here; --yes agrees" in err
    assert not cache.exists()


@pytest.mark.parametrize("answer", [True, False])
def test_the_question(answer, saved, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(
        downloading, "sys", type("sys", (), {"stdin": type("in", (), {"isatty": lambda: True})})
    )
    monkeypatch.setattr(typer, "confirm", lambda question, err: asked.append(question) or answer)
    run("prepare", saved, code=0 if answer else 1)
    assert len(asked) == 1 and asked[0].startswith("write 0.000") and asked[0].endswith(f" GB to {cache}?")
    assert bool(folders(cache)) == answer


def test_a_video_from_what_is_prepared(saved, cache, here):
    options = ["--steps", 1, "--frames", 5, "--height", 32, "--width", 32, "--seed", 1, "-q"]
    run("t2v", "a", "-m", saved, "--prepare", "bf16", *options, "-o", "a.npy")
    assert len(folders(cache)) == 3
    run("t2v", "a", "-m", saved, "--dtype", "bf16", *options, "-o", "b.npy")
    assert (here / "a.npy").read_bytes() == (here / "b.npy").read_bytes()


def test_nothing_to_prepare(saved_bf16, cache):
    out, err = run("prepare", saved_bf16)
    assert out == "" and "has nothing to prepare: its weights are in bfloat16 already" in err
    out, _ = run("prepare", saved_bf16, "--json")
    assert json.loads(out) == {"prepared": []}


def test_one_file(saved, cache, tmp_path):
    sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1, "ffn_dim": 64}
    WanTransformer3DModel(**sizes, text_dim=32, freq_dim=32).save_pretrained(tmp_path / "model")
    run("prepare", tmp_path / "model/diffusion_pytorch_model.safetensors", "--yes")
    assert folders(cache) == ["transformer-bf16"]
    _, err = run("prepare", saved / "vae/diffusion_pytorch_model.safetensors")
    assert "has nothing to prepare" in err
    _, err = run("prepare", saved / "transformer/config.json", code=1)
    assert "config.json" in err


def test_a_repository(saved, cache, tmp_path, monkeypatch):
    make_repository(tmp_path / "hub", "org/name", {"main": saved})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = {"cache_dir": tmp_path / "hub"}
    located = preparing._located
    monkeypatch.setattr(preparing, "_located", lambda *a: _in_cache(located(*a), hub))
    monkeypatch.setattr(of_pipelines, "bytes_to_download", lambda *a: 123_000_000)
    _, err = run("prepare", "org/name", code=1)
    assert f"error: download 0.123 GB of org/name to {tmp_path / 'hub'}: nobody can be asked here" in err
    run("prepare", "org/name", "--yes")
    assert len(folders(cache)) == 3


def _in_cache(checkpoint, hub):
    from wan22.pipelines.loading.load import locate

    return locate(checkpoint.source, hub)


@pytest.mark.parametrize("free", [1000, 10**12])
def test_a_disk_that_is_too_small(free, saved, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    if free > 10**9:
        run("prepare", saved, "--yes")
        return
    _, err = run("prepare", saved, "--yes", code=1)
    assert "but its disk has 1e-06 GB left; the environment variable WAN22_CACHE can name a folder" in err
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("nothing",), "there is no file or folder nothing"),
        (("tiny-t2v", "--dtype", "int8"), "--dtype='int8' must be one of 'bf16', 'fp8'"),
        (("file", "--revision", "main"), "--revision main is for repositories"),
    ],
)
def test_mistakes(arguments, what, saved, cache, here):
    shutil.copy(saved / "transformer/diffusion_pytorch_model.safetensors", "file")
    _, err = run("prepare", *arguments, code=1)
    assert what in err
