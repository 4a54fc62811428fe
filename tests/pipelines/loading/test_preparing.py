"""Pipelines from prepared models: the same to the bit, found by themselves, under the source's name."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import latents_of, load_pipeline, random_transformer
from tests.checkpoints.preparing.test_prepare import assert_equal
from tests.pipelines.loading.repositories import make_repository
from wan22 import WanT2VPipeline
from wan22.checkpoints.converting.convert import convert
from wan22.checkpoints.preparing import cache as cached_models
from wan22.pipelines.loading import preparing
from wan22.pipelines.loading.checkpoint import Wanted
from wan22.pipelines.loading.load import locate, transformers_as_stored

BF16 = torch.bfloat16
DTYPES = {"default": BF16, "vae": torch.float32}
MODELS = ("transformer", "transformer_2", "text_encoder", "vae")


@pytest.fixture(scope="module")
def official(saved, tmp_path_factory):
    return convert(saved, tmp_path_factory.mktemp("official") / "t2v", "official")


@pytest.fixture(params=["diffusers", "official"])
def folder(request, saved, official):
    return saved if request.param == "diffusers" else official


def folders(cache):
    return sorted(path.name.rpartition("-")[0] for path in cache.glob("*-*"))


def assert_same(one, other):
    for name in MODELS:
        assert_equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def log(caplog):
    for name in ("wan22", preparing.__name__):  # which a quiet command of another test may have silenced
        caplog.set_level(logging.INFO, name)
    return caplog


def test_a_prepared_pipeline_is_a_converted_one(folder, cache, log):
    plain = load_pipeline(folder, dtype=DTYPES)
    assert not cache.exists() and "prepared" not in log.text
    first = load_pipeline(folder, prepare="bf16")
    assert folders(cache) == ["text_encoder-bf16", "transformer-bf16", "transformer-bf16"]
    log.clear()
    found = load_pipeline(folder, dtype=DTYPES)
    (line,) = [r.getMessage() for r in log.records if "prepared" in r.getMessage()]
    assert line.startswith(f"{folder}: t") and line.endswith(f" as prepared in {cache}")
    assert all(name in line for name in MODELS if name != "vae")
    assert_same(first, plain)
    assert_same(found, plain)
    assert torch.equal(latents_of(found), latents_of(plain))


def test_float8_is_quantize(folder, cache, monkeypatch):
    plain = load_pipeline(folder, dtype=DTYPES, quantize="fp8")
    first = load_pipeline(folder, prepare="fp8")
    assert folders(cache) == ["text_encoder-bf16", "transformer-fp8", "transformer-fp8"]
    monkeypatch.setattr("wan22.pipelines.attached.acceleration.quantize", None)  # is not called any more
    found = load_pipeline(folder, dtype=DTYPES, quantize="fp8")
    assert_same(first, plain)
    assert_same(found, plain)
    assert torch.equal(latents_of(found), latents_of(plain))
    assert found.acceleration.changes() == plain.acceleration.changes()


def test_float8_is_not_taken_where_nobody_asked(folder, cache):
    load_pipeline(folder, prepare="fp8")
    others = [{"quantize": text} for text in ("int8", "fp8:low", "fp8:keep=1,0", "fp8:high:block=16")]
    for options in ({}, *others, {"quantize": "fp8", "dequantize": True}):
        with torch.no_grad():
            found = load_pipeline(folder, dtype=DTYPES, **options)
        os.environ["WAN22_CACHE"], before = os.devnull, os.environ["WAN22_CACHE"]
        plain = load_pipeline(folder, dtype=DTYPES, **options)
        os.environ["WAN22_CACHE"] = before
        assert_same(found, plain)


def test_other_dtypes_are_converted_as_ever(folder, cache):
    load_pipeline(folder, prepare="bf16")
    for dtype in (torch.float16, torch.float32, None):
        pipe = load_pipeline(folder, dtype=dtype)
        assert pipe.transformer.dtype == (dtype or torch.float32)
        assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype != BF16


def test_recipes_name_the_source(folder, cache):
    plain = load_pipeline(folder, dtype=DTYPES)
    load_pipeline(folder, prepare="bf16")
    found = load_pipeline(folder, dtype=DTYPES)
    video = found("a red circle", height=32, width=32, num_frames=5, num_inference_steps=1, seed=1)
    assert video.recipe.origin == plain.provenance.origin()
    assert video.recipe.origin.place == str(folder)
    assert str(cache) not in json.dumps(video.recipe.to_dict())
    names = [
        (pipe.transformer.config.get("_name_or_path"), pipe.text_encoder.config.name_or_path)
        for pipe in (found, plain)
    ]
    assert names[0] == names[1]
    plain.provenance.check(video.recipe)
    again = plain.reproduce(video.recipe)
    assert (again.frames == video.frames).all()


def test_a_changed_source_is_converted(saved, cache, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "mine")
    load_pipeline(folder, prepare="bf16")
    random_transformer(9).save_pretrained(folder / "transformer")
    found = load_pipeline(folder, dtype=BF16)
    weight = random_transformer(9).blocks[0].ffn.net[2].weight
    assert torch.equal(found.transformer.blocks[0].ffn.net[2].weight, weight.to(BF16))


def test_one_folder_that_is_missing_is_made_again(saved, cache):
    load_pipeline(saved, prepare="bf16")
    gone = next(cache.glob("text_encoder-*"))
    kept = {path: path.stat().st_ino for path in cache.glob("transformer-*/*.safetensors")}
    shutil.rmtree(gone)
    load_pipeline(saved, prepare="bf16")
    assert gone.is_dir() and {path: path.stat().st_ino for path in kept} == kept


def test_a_repository_of_the_hub(saved, cache, tmp_path):
    make_repository(tmp_path / "hub", "org/name", {"main": saved})
    hub = {"cache_dir": tmp_path / "hub"}
    plain = load_pipeline("org/name", dtype=DTYPES, **hub)
    first = load_pipeline("org/name", prepare="bf16", **hub)
    assert_same(first, plain)
    assert first.provenance.origin() == plain.provenance.origin()
    assert first.provenance.origin().place == "org/name"


def test_single_files(cache, official, log):
    high, low = (next((official / f).glob("*.safetensors")) for f in ("high_noise_model", "low_noise_model"))
    parts = {"vae": next(official.glob("*VAE.pth")), "text_encoder": next(official.glob("models_t5*"))}
    parts |= {"tokenizer": official / "google/umt5-xxl", "attention_head_dim": 24}
    plain = WanT2VPipeline.from_single_file(high, low, **parts, dtype=DTYPES)
    first = WanT2VPipeline.from_single_file(high, low, **parts, prepare="bf16")
    found = WanT2VPipeline.from_single_file(high, low, **parts, dtype=DTYPES)
    assert "transformer, transformer_2, text_encoder as prepared in" in log.text
    assert_same(first, plain)
    assert_same(found, plain)


def test_ranks_that_convert_part_by_part_find_it(folder, cache):
    load_pipeline(folder, prepare="bf16")
    dtype, wanted = transformers_as_stored(Wanted.of(WanT2VPipeline, BF16, False, {}))
    pipe = locate(str(folder), {}).load(WanT2VPipeline, wanted)
    assert dtype == BF16 and wanted.dtype_of("transformer") is None
    for model in (pipe.transformer, pipe.transformer_2):
        assert model.blocks[0].attn1.to_q.weight.dtype == BF16


def test_offline_nobody_knows_what_a_download_takes(tmp_path):
    assert preparing.bytes_to_download("org/name", ["*.json"], {"cache_dir": tmp_path}) is None


def test_a_variant_is_prepared_apart(saved, cache, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "mine")
    other = random_transformer(9)
    save_file(other.state_dict(), folder / "transformer/diffusion_pytorch_model.mine.safetensors")
    load_pipeline(folder, prepare="bf16")
    found = load_pipeline(folder, prepare="bf16", variant="mine")
    assert torch.equal(
        found.transformer.blocks[0].ffn.net[2].weight, other.blocks[0].ffn.net[2].weight.to(BF16)
    )


# ---- what is said ----


def test_a_load_that_converts_says_what_it_costs(folder, cache, log, monkeypatch):
    load_pipeline(folder, dtype=DTYPES)
    assert "wan22 prepare" not in log.text, "not for small ones"
    monkeypatch.setattr(preparing, "WORTH_A_LINE", 1)
    load_pipeline(folder, dtype=DTYPES)
    (record,) = [record for record in log.records if "wan22 prepare" in record.getMessage()]
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith(f"{folder}: each load reads ") and f"`wan22 prepare {folder}` does it once" in text
    log.clear()
    load_pipeline(folder, prepare="bf16")
    load_pipeline(folder, dtype=DTYPES)
    load_pipeline(folder)
    assert "wan22 prepare" not in log.text


def test_the_bytes_that_are_named(saved, cache, log, monkeypatch):
    monkeypatch.setattr(preparing, "WORTH_A_LINE", 1)
    monkeypatch.setattr(cached_models, "_KINDS", ("transformer",))
    pipe = load_pipeline(saved, dtype=DTYPES)
    count = sum(p.numel() for m in (pipe.transformer, pipe.transformer_2) for p in m.parameters())
    assert f"reads {4 * count / 1e9:.3g} GB and converts them to {2 * count / 1e9:.3g} GB" in log.text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prepare": "int8"}, "prepare='int8' must be one of 'bf16', 'fp8'"),
        (
            {"prepare": "bf16", "dtype": torch.float16},
            r"dtype=torch\.float16 for transformer: what prepare='bf16'",
        ),
        ({"prepare": "fp8", "quantize": "int8"}, "quantize='int8': prepare='fp8' is quantised already"),
        ({"prepare": "fp8", "quantize": "fp8:low"}, "quantize='fp8:low': prepare='fp8' is quantised"),
        ({"prepare": "fp8", "dequantize": True}, "dequantize=True undoes prepare='fp8'"),
        ({"prepare": "bf16", "device_map": "balanced"}, "device_map does not go with prepare"),
    ],
)
def test_what_does_not_go_together(options, what, saved, cache):
    with pytest.raises(ValueError, match=what):
        load_pipeline(saved, **options)
    assert not cache.exists()


@pytest.mark.slow
def test_a_budget_counts_prepared_models_as_mapped(folder, cache, monkeypatch):
    seen = []
    real = preparing.find_all
    monkeypatch.setattr(preparing, "find_all", lambda *a: seen.append(real(*a)) or seen[-1])
    load_pipeline(folder, prepare="bf16", memory="auto")
    pipe = load_pipeline(folder, dtype=DTYPES, memory="auto")
    assert pipe.memory.has_plan and all(seen[-2:]), "found for the outline and the load"
    quantized = load_pipeline(folder, prepare="fp8", memory="auto")
    found = quantized.acceleration.changes()["quantized"]
    assert found == {name: {"fp8": 20} for name in ("transformer", "transformer_2")}
    assert load_pipeline(folder, dtype=DTYPES, quantize="fp8", memory="auto").memory.has_plan
