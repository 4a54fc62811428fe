"""Pipelines from folders and repositories in the official layout."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.builders import (
    byte_tokenizer,
    golden_transformer,
    golden_vae,
    load_pipeline,
    random_i2v_components,
)
from tests.checkpoints.loading.test_image_encoder import official_clip
from tests.golden_data import golden
from tests.pipelines.loading.repositories import (
    FORMS,
    error_to_golden,
    golden_latents,
    make_repository,
    write_official,
)
from wan22 import (
    AutoencoderKLWan,
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
    WanTransformer3DModel,
)
from wan22.checkpoints.naming.keys import TRANSFORMER
from wan22.pipelines.loading import preparing


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    transformers, vae, pipeline, boundary, shift = FORMS[request.param]
    folder = write_official(tmp_path_factory.mktemp("official") / request.param, transformers, vae)
    return folder, transformers, vae, pipeline, boundary, shift


def test_an_official_folder(form):
    folder, transformers, vae, pipeline, boundary, shift = form
    pipe = pipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.config.boundary_ratio == boundary
    assert pipe.config.expand_timesteps == (vae == "vae22")
    assert (pipe.transformer_2 is not None) == (len(transformers) == 2)
    assert type(pipe.scheduler) is FlowMatchUniPCScheduler
    assert pipe.scheduler.config.shift == shift
    assert pipe.text_encoder.config.num_layers == golden("t5").info["config"]["num_layers"]
    assert pipe.tokenizer("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]
    assert not (folder / "model_index.json").exists()


def test_a_part_of_an_official_folder(form):
    """Latents alone without VAE and text encoder, prompts alone without the rest."""
    folder, _, _, pipeline, *_ = form
    part = pipeline.from_pretrained(folder, vae=None, text_encoder=None, tokenizer=None)
    assert part.vae is part.text_encoder is None and part.transformers
    assert part.latent_shape(5, 64, 64) == pipeline.from_pretrained(folder).latent_shape(5, 64, 64)
    encoders = pipeline.from_pretrained(folder, vae=None, transformer=None, transformer_2=None)
    assert encoders.vae is encoders.scheduler is None and not encoders.transformers
    assert encoders.encode_prompt("a", do_classifier_free_guidance=False)[0].shape[:2] == (1, 512)


def test_official_folders_give_the_official_numbers(tmp_path):
    for name, form in (("pipe_t2v_unipc", "t2v"), ("pipe_ti2v_text", "ti2v")):
        transformers, vae, pipeline, _, _ = FORMS[form]
        folder = write_official(tmp_path / form, transformers, vae)
        assert error_to_golden(pipeline.from_pretrained(folder, dtype=torch.float32), name) <= 5e-6


def test_the_other_pipeline_is_named(form, tmp_path):
    folder, _, vae, pipeline, *_ = form
    other = WanI2VPipeline if pipeline is WanT2VPipeline else WanT2VPipeline
    if vae == "vae22":  # serves both
        assert other.from_pretrained(folder).config.expand_timesteps
        return
    with pytest.raises(ValueError, match=f"use {pipeline.__name__}"):
        other.from_pretrained(folder)


def test_saved_it_is_in_the_diffusers_layout(tmp_path):
    folder = write_official(tmp_path / "official", *FORMS["t2v"][:2])
    pipe = WanT2VPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "diffusers")
    again = load_pipeline(tmp_path / "diffusers")
    assert torch.equal(golden_latents(pipe, "pipe_t2v_unipc"), golden_latents(again, "pipe_t2v_unipc"))


def test_only_the_files_needed_are_read_from_the_hub(tmp_path, monkeypatch):
    folder = write_official(tmp_path / "official", *FORMS["t2v"][:2])
    make_repository(tmp_path / "cache", "org/wan", {"main": folder})
    from wan22.pipelines.loading import load, official_layout

    asked = []
    download = load.snapshot_download

    def record(*args, allow_patterns, **kwargs):
        asked.append(allow_patterns)
        return download(*args, allow_patterns=allow_patterns, **kwargs)

    for module in (load, official_layout):
        monkeypatch.setattr(module, "snapshot_download", record)
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipe = WanT2VPipeline.from_pretrained("org/wan", dtype=torch.float32, **hub)
    assert error_to_golden(pipe, "pipe_t2v_unipc") <= 5e-6
    assert pipe.checkpoint_name == "org/wan"
    assert asked[0] == load._SMALL_FILES
    matched = {p.relative_to(folder) for pattern in asked[1] for p in folder.rglob(pattern) if p.is_file()}
    assert {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} - matched == {Path("README.md")}
    with pytest.raises(ValueError, match="use WanT2VPipeline"):
        WanI2VPipeline.from_pretrained("org/wan", **hub)
    assert len(asked) == 3, "it is refused before the weights are downloaded"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("low_noise_model", "has high_noise_model, but no low_noise_model"),
        ("Wan2.1_VAE.pth", r"must hold one \*VAE\.pth; found: none"),
        ("models_t5_umt5-xxl-enc-bf16.pth", r"must hold one models_t5\*\.pth; found: none"),
        ("google", r"must hold one google/umt5-xxl; found: none"),
        ("high_noise_model/diffusion_pytorch_model.safetensors", "must hold one safetensors file"),
    ],
)
def test_what_is_missing_is_named(missing, message, tmp_path):
    folder = write_official(tmp_path / "official", *FORMS["t2v"][:2])
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        WanT2VPipeline.from_pretrained(folder)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model_index\.json .* nor high_noise_model"):
        WanT2VPipeline.from_pretrained(tmp_path)


def test_components_can_be_given_or_left_out(tmp_path):
    folder = write_official(tmp_path / "official", *FORMS["t2v"][:2])
    pipe = WanT2VPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, transformer_2=None)
    assert (pipe.text_encoder, pipe.tokenizer, pipe.transformer_2) == (None, None, None)
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = WanT2VPipeline.from_pretrained(folder, vae=pipe.vae, dtype=dtypes)
    assert [m.dtype for m in (pipe.vae, pipe.text_encoder)] == [torch.float32, torch.bfloat16]
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device_map cannot be used with official folders"):
        WanT2VPipeline.from_pretrained(folder, device_map="cpu")


@pytest.mark.parametrize("two_frames", [False, True])
def test_wan_2_1_for_images(two_frames, tmp_path):
    """Its official folder also holds CLIP."""
    components = random_i2v_components(1, two_frames)
    weights = components["transformer"].state_dict()
    official = {TRANSFORMER.inverse.rename(name): w.contiguous() for name, w in weights.items()}
    folder = tmp_path / "official"
    write_official(folder, ("dit_t2v_hd32",), "vae21")
    save_file(official, folder / "diffusion_pytorch_model.safetensors")
    heads = components["transformer"].config.num_attention_heads
    dim = heads * components["transformer"].config.attention_head_dim
    config = {"_class_name": "WanModel", "model_type": "flf2v" if two_frames else "i2v"}
    (folder / "config.json").write_text(json.dumps(config | {"dim": dim, "num_heads": heads, "eps": 1e-6}))
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=80,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=28,
            patch_size=14,
            hidden_act="gelu",
        )
    )
    torch.save(official_clip(vision), folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    pipe = WanI2VPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.config.boundary_ratio is None
    assert pipe.transformer.config.image_dim == components["transformer"].config.image_dim
    assert all(torch.equal(w, pipe.transformer.state_dict()[name]) for name, w in weights.items())
    assert pipe.image_encoder.config.hidden_size == 80
    assert (
        pipe.image_processor(images=torch.zeros(3, 8, 8), return_tensors="pt")["pixel_values"].shape[-1]
        == 224
    )
    with pytest.raises(ValueError, match="use WanI2VPipeline"):
        WanT2VPipeline.from_pretrained(folder)


# ---- models by themselves ----


def test_models_of_cached_repositories(tmp_path):
    """In the official layout and in Diffusers', where each model is a folder."""
    folder = write_official(tmp_path / "official", *FORMS["t2v"][:2])
    WanT2VPipeline.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "diffusers")
    for name, source in (("org/official", folder), ("org/diffusers", tmp_path / "diffusers")):
        make_repository(tmp_path / "cache", name, {"main": source})
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True, "dtype": torch.float32}
    for low, vae, repository in (
        ("low_noise_model", None, "org/official"),
        ("transformer_2", "vae", "org/diffusers"),
    ):
        model = WanTransformer3DModel.from_pretrained(repository, subfolder=low, **hub)
        expected = golden_transformer("expert_t2v_low").state_dict()
        assert all(torch.equal(w, model.state_dict()[name]) for name, w in expected.items())
        assert model.config.attention_head_dim == 24
        model = AutoencoderKLWan.from_pretrained(repository, subfolder=vae, **hub)
        assert all(
            torch.equal(w, model.state_dict()[name]) for name, w in golden_vae("vae21").state_dict().items()
        )
    assert AutoencoderKLWan.from_pretrained(folder).config.z_dim == 16
    with pytest.raises(OSError, match="org/nothing"):
        WanTransformer3DModel.from_pretrained("org/nothing", **hub)
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./nowhere"):
        WanTransformer3DModel.from_pretrained("./nowhere")
    with pytest.raises(FileNotFoundError, match="must hold one safetensors file"):
        WanTransformer3DModel.from_pretrained(folder, subfolder="google")


def test_loading_shows_how_far_it_is(form, monkeypatch, capsys, bars_are_wanted):
    folder, *_, pipeline, _, _ = form
    monkeypatch.setattr("wan22.progress.in_notebook", lambda: True)  # where bars are drawn
    bar = preparing.bytes_bar
    told = []
    for delay in (3600, 0):  # seconds that loading takes before a bar is drawn
        monkeypatch.setattr(preparing, "bytes_bar", partial(bar, delay=delay))
        pipeline.from_pretrained(folder, dtype=torch.bfloat16)
        told.append(capsys.readouterr().err)
    early, told = told
    assert "loading" not in early
    assert "100%" in told and "loading text_encoder" in told and "B/s" in told
    total = told.rpartition("%")[2].partition("[")[0].partition("/")
    assert total[0].split()[-1] == total[2].split()[0], "all bytes that were announced"
    pipeline.from_pretrained(folder)
    assert "loading" not in capsys.readouterr().err, "nothing is converted"
