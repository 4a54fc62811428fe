"""Pipelines from official folders and from single files."""

import json
import shutil
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
from tests.checkpoints import writers
from tests.checkpoints.loading.test_image_encoder import official_clip
from tests.golden_data import FOLDER, golden, relative_error
from tests.pipelines.test_hub import make_repository
from wan22 import (
    AutoencoderKLWan,
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
    WanTransformer3DModel,
)
from wan22.checkpoints.loading.quantized_linear import QuantizedLinear
from wan22.checkpoints.naming.keys import TRANSFORMER

# The golden files' heads: what an official config.json says and the shapes do not.
CONFIGS = {
    name: {
        "_class_name": "WanModel",
        "model_type": kind,
        "dim": golden(name).info["config"]["dim"],
        "num_heads": golden(name).info["config"]["num_heads"],
        "eps": golden(name).info["config"]["eps"],
    }
    for name, kind in (
        ("expert_t2v_high", "t2v"), ("expert_t2v_low", "t2v"), ("dit_t2v_hd32", "t2v"),
        ("dit_i2v_hd32", "i2v"), ("expert_i2v_low", "i2v"), ("dit_ti2v_hd24", "ti2v"),
    )
}  # fmt: skip


def write_transformer(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDER / f"{name}.weights.safetensors", folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))


def write_official(folder, transformers, vae):
    """Write a repository in the official layout from golden weights."""
    if len(transformers) == 1:
        write_transformer(transformers[0], folder)
    else:
        for name, place in zip(transformers, ("high_noise_model", "low_noise_model"), strict=True):
            write_transformer(name, folder / place)
    torch.save(golden(vae).weights, folder / ("Wan2.2_VAE.pth" if vae == "vae22" else "Wan2.1_VAE.pth"))
    torch.save(golden("t5").weights, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    byte_tokenizer().save_pretrained(folder / "google/umt5-xxl")
    (folder / "README.md").write_text("a file that nobody needs")
    return folder


FORMS = {
    "t2v": (("expert_t2v_high", "expert_t2v_low"), "vae21", WanT2VPipeline, 0.875, 12.0),
    "i2v": (("dit_i2v_hd32", "expert_i2v_low"), "vae21", WanI2VPipeline, 0.9, 5.0),
    "ti2v": (("dit_ti2v_hd24",), "vae22", WanT2VPipeline, None, 5.0),
    "2.1": (("dit_t2v_hd32",), "vae21", WanT2VPipeline, None, 8.0),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request, tmp_path_factory):
    transformers, vae, pipeline, boundary, shift = FORMS[request.param]
    folder = write_official(tmp_path_factory.mktemp("official") / request.param, transformers, vae)
    return folder, transformers, vae, pipeline, boundary, shift


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def golden_latents(pipe, name):
    """The final latents of a golden text-to-video call."""
    info, _, tensors = golden(name)
    official = info["generate_args"]
    scale = official["guide_scale"]
    low, high = scale if isinstance(scale, list) else (None, scale)
    return quiet(pipe)(
        prompt_embeds=tensors["context"][None],
        negative_prompt_embeds=tensors["context_null"][None],
        width=official["size"][0],
        height=official["size"][1],
        num_frames=official["frame_num"],
        num_inference_steps=official["sampling_steps"],
        flow_shift=official["shift"],
        guidance_scale=high,
        guidance_scale_2=low,
        seed=info["seed"],
        output_type="latent",
    ).frames[0]


def error_to_golden(pipe, name):
    return relative_error(golden_latents(pipe, name), golden(name).io["final_latent"])


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
    from wan22.pipelines import files

    asked = []
    download = files.snapshot_download

    def record(*args, allow_patterns, **kwargs):
        asked.append(allow_patterns)
        return download(*args, allow_patterns=allow_patterns, **kwargs)

    monkeypatch.setattr(files, "snapshot_download", record)
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipe = WanT2VPipeline.from_pretrained("org/wan", dtype=torch.float32, **hub)
    assert error_to_golden(pipe, "pipe_t2v_unipc") <= 5e-6
    assert pipe.checkpoint_name == "org/wan"
    assert asked[0] == ["model_index.json", *files.OFFICIAL_CONFIGS]
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


# ---- single files ----


def test_each_file_may_be_of_another_format(tmp_path):
    """The high-noise expert in ComfyUI's scaled float8, the low-noise one as .pth, with prefixes."""
    high, low = (golden(name).weights for name in ("expert_t2v_high", "expert_t2v_low"))
    values = writers.comfy_old({k: v.clone() for k, v in high.items()}, tmp_path / "high.safetensors")
    torch.save({f"model.diffusion_model.{name}": w for name, w in low.items()}, tmp_path / "low.pth")
    torch.save(golden("vae21").weights, tmp_path / "vae.pth")
    save_file(golden("t5").weights, tmp_path / "t5.safetensors")
    save_file({k: v.contiguous() for k, v in values.items()}, tmp_path / "expanded.safetensors")

    def pipeline(high):
        return WanT2VPipeline.from_single_file(
            tmp_path / high,
            str(tmp_path / "low.pth"),
            vae=tmp_path / "vae.pth",
            text_encoder=tmp_path / "t5.safetensors",
            tokenizer=byte_tokenizer(),
            dtype=torch.float32,
            attention_head_dim=24,
        )

    pipe = pipeline("high.safetensors")
    assert pipe.config.boundary_ratio == 0.875
    assert pipe.scheduler.config.shift == 12.0
    assert isinstance(pipe.transformer.blocks[0].ffn.net[2], QuantizedLinear)
    assert not isinstance(pipe.transformer_2.blocks[0].ffn.net[2], QuantizedLinear)
    expected = golden_latents(pipeline("expanded.safetensors"), "pipe_t2v_unipc")
    torch.testing.assert_close(golden_latents(pipe, "pipe_t2v_unipc"), expected, rtol=1e-4, atol=1e-5)


def test_one_transformer_and_models_in_place_of_files(tmp_path):
    save_file(golden("dit_ti2v_hd24").weights, tmp_path / "w.safetensors")
    torch.save(golden("vae22").weights, tmp_path / "vae.pth")
    for pipeline in (WanT2VPipeline, WanI2VPipeline):
        pipe = pipeline.from_single_file(
            tmp_path / "w.safetensors", vae=tmp_path / "vae.pth", attention_head_dim=24, dtype=torch.float32
        )
        assert pipe.config.expand_timesteps
        assert pipe.config.boundary_ratio is None
        assert pipe.text_encoder is None
    again = WanT2VPipeline.from_single_file(
        tmp_path / "w.safetensors",
        vae=pipe.vae,
        attention_head_dim=24,
        scheduler=FlowMatchUniPCScheduler(shift=9.0),
    )
    assert again.vae is pipe.vae
    assert again.scheduler.config.shift == 9.0


def test_single_files_for_images(tmp_path):
    for slot, name in (("high", "dit_i2v_hd32"), ("low", "expert_i2v_low")):
        save_file(golden(name).weights, tmp_path / f"{slot}.safetensors")
    torch.save(golden("vae21").weights, tmp_path / "vae.pth")
    pipe = WanI2VPipeline.from_single_file(
        tmp_path / "high.safetensors",
        tmp_path / "low.safetensors",
        vae=tmp_path / "vae.pth",
        dtype=torch.float32,
        attention_head_dim=32,
    )
    assert pipe.config.boundary_ratio == 0.9
    info, _, io = golden("pipe_i2v_unipc")
    official = info["generate_args"]
    latents = quiet(pipe)(
        io["image_uint8_hwc"].numpy(),
        prompt_embeds=io["context"][None],
        negative_prompt_embeds=io["context_null"][None],
        max_area=official["max_area"],
        num_frames=official["frame_num"],
        num_inference_steps=official["sampling_steps"],
        flow_shift=official["shift"],
        guidance_scale=official["guide_scale"][1],
        guidance_scale_2=official["guide_scale"][0],
        seed=info["seed"],
        output_type="latent",
    ).frames[0]
    assert relative_error(latents, io["final_latent"]) <= 5e-6


def test_single_files_that_do_not_fit(tmp_path):
    save_file(golden("expert_t2v_high").weights, tmp_path / "w.safetensors")
    torch.save(golden("vae22").weights, tmp_path / "vae22.pth")
    with pytest.raises(ValueError, match="give vae="):
        WanT2VPipeline.from_single_file(tmp_path / "w.safetensors", attention_head_dim=24)
    with pytest.raises(ValueError, match="16 latent channels, the VAE has 48"):
        WanT2VPipeline.from_single_file(
            tmp_path / "w.safetensors", vae=tmp_path / "vae22.pth", attention_head_dim=24
        )
    torch.save(golden("vae21").weights, tmp_path / "vae21.pth")
    with pytest.raises(ValueError, match="use WanT2VPipeline"):
        WanI2VPipeline.from_single_file(
            tmp_path / "w.safetensors", vae=tmp_path / "vae21.pth", attention_head_dim=24
        )
    with pytest.raises(ValueError, match="hi cannot be used"):
        WanT2VPipeline.from_single_file(tmp_path / "w.safetensors", vae=tmp_path / "vae22.pth", hi=1)


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


def test_loading_shows_how_far_it_is(form, monkeypatch, capsys):
    folder, *_, pipeline, _, _ = form
    monkeypatch.setattr("wan22.video.progress.in_notebook", lambda: True)  # where bars are drawn
    pipeline.from_pretrained(folder)
    told = capsys.readouterr().err
    assert "loading: 100%" in told and "tokenizer" in told
