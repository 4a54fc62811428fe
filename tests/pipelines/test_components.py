"""Pipelines put together from given components, and from other pipelines."""

import copy
import gc
import json
import pickle
import weakref

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.builders import (
    MODELS,
    SMALL,
    bf16_pipeline,
    latents_of,
    load_pipeline,
    random_components,
    random_i2v_components,
    random_pipeline,
    recording,
)
from wan22 import (
    AutoencoderKLWan,
    FlowMatchEulerScheduler,
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
)

# ---- given components ----


def test_passed_components(saved, tmp_path):
    given = random_components()
    pipe = load_pipeline(
        saved,
        vae=given["vae"],
        transformer=given["transformer"],
        scheduler=FlowMatchEulerScheduler(shift=2.0),
    )
    assert pipe.vae is given["vae"]
    assert pipe.transformer is given["transformer"]
    assert type(pipe.scheduler) is FlowMatchEulerScheduler
    assert pipe.scheduler.config.shift == 2.0


def test_a_vae_in_float32_beside_bf16_models(saved_bf16):
    """The usual script: the VAE is loaded by itself, with our class or diffusers', and handed over."""
    for cls in (AutoencoderKLWan, diffusers.AutoencoderKLWan):
        vae = cls.from_pretrained(saved_bf16, subfolder="vae", dtype=torch.float32)
        pipe = load_pipeline(saved_bf16, vae=vae, dtype=torch.bfloat16)
        assert pipe.vae.dtype == torch.float32
        assert pipe.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["transformer", "transformer_2", "text_encoder"])
def test_a_component_left_out(name, saved):
    pipe = load_pipeline(saved, **{name: None})
    assert getattr(pipe, name) is None
    embeds, negative = random_pipeline().encode_prompt("a red circle", "fog")
    timesteps = [800, 400] if name == "transformer" else [1000, 900]
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "timesteps": timesteps}
    assert torch.equal(latents_of(pipe, **given), latents_of(random_pipeline(), **given))


def test_saving_without_a_component(saved, tmp_path):
    load_pipeline(saved, transformer_2=None, text_encoder=None).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer_2"] == index["text_encoder"] == [None, None]
    with pytest.raises(ValueError, match="lists no text_encoder; give text_encoder=, or None"):
        load_pipeline(tmp_path)
    pipe = load_pipeline(tmp_path, text_encoder=None)
    assert pipe.transformer_2 is pipe.text_encoder is None
    assert pipe.config.boundary_ratio == 0.875


ENCODERS = {"vae", "scheduler", "transformer", "transformer_2"}  # absent where only text is encoded
LATENTS = {"tokenizer", "text_encoder", "vae"}  # absent where only latents are made
DECODER = {"tokenizer", "text_encoder", "scheduler", "transformer", "transformer_2"}


@pytest.mark.parametrize("absent", [ENCODERS, LATENTS, DECODER], ids=["encoders", "latents", "decoder"])
def test_pipelines_with_a_part_of_the_components(absent, pipe, saved, tmp_path):
    """Put together, loaded, saved and loaded again."""
    embeds, negative = pipe.encode_prompt("a red circle", "fog")
    latents = latents_of(pipe, negative_prompt="fog")
    none = dict.fromkeys(absent)
    built = WanT2VPipeline(**pipe.components | none, boundary_ratio=0.875)
    built.save_pretrained(tmp_path)
    for part in (built, load_pipeline(saved, **none), load_pipeline(tmp_path, **none)):
        assert {name for name, component in part.components.items() if component is None} == absent
        part.set_progress_bar_config(disable=True)
        assert part.to("cpu") is part
        if absent == ENCODERS:
            found = part.encode_prompt("a red circle", "fog")
            assert all(map(torch.equal, found, (embeds, negative)))
        elif absent == LATENTS:
            given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
            assert torch.equal(latents_of(part, **given), latents)
        else:
            assert np.array_equal(part.decode(latents), pipe.decode(latents))


@pytest.mark.parametrize(
    ("absent", "arguments", "message"),
    [
        (
            ["vae"],
            {"output_type": "np"},
            r"pipe\.vae is None, and output_type='np' needs it.* needs none",
        ),
        (["vae"], {"preview": True}, r"pipe\.vae is None, and preview needs it"),
        (["vae"], {"output_type": "stream"}, r"output_type='stream' needs it"),
        (["scheduler"], {}, r"pipe\.scheduler is None"),
        (["transformer", "transformer_2"], {}, "neither transformer nor transformer_2 is loaded"),
        (["transformer"], {}, r"served by the high noise expert, but pipe\.transformer is None"),
    ],
)
def test_what_needs_an_absent_component_is_refused(absent, arguments, message):
    pipe = random_pipeline(**dict.fromkeys(absent))
    with recording(pipe) as calls, pytest.raises(ValueError, match=message):
        latents_of(pipe, **arguments)
    assert not calls


def test_what_needs_an_absent_component_beside_the_call():
    pipe = random_pipeline(vae=None)
    for act in (pipe.fit, lambda: pipe.decode(torch.zeros(1, 16, 2, 4, 4))):
        with pytest.raises(ValueError, match=r"pipe\.vae is None"):
            act()
    pipe.accelerate()
    pipe.decelerate()
    with pytest.raises(ValueError, match="neither transformer nor transformer_2"):
        random_pipeline(transformer=None, transformer_2=None).fit()


def test_sizes_without_a_vae(pipe, ti2v_pipe):
    for whole in (pipe, ti2v_pipe):
        part = WanT2VPipeline.from_pipe(whole, vae=None)
        assert part.latent_shape(5, 64, 32) == whole.latent_shape(5, 64, 32)
    assert (
        WanT2VPipeline.from_pipe(pipe, vae=None, transformer=None, transformer_2=None).latent_channels == 16
    )


def test_a_pipeline_from_anothers_components(pipe):
    """They leave the settings out; a call says what is missing."""
    other = WanT2VPipeline(**pipe.components)
    assert other.components == pipe.components
    message = (
        r"transformer_2 is given but boundary_ratio is None.*register_to_config\(boundary_ratio=0\.875\)"
    )
    with pytest.raises(ValueError, match=message):
        latents_of(other)
    other.register_to_config(boundary_ratio=0.875)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(other), latents_of(pipe))


def test_an_image_needs_the_vae():
    components = random_i2v_components()
    pipe = WanI2VPipeline(**components | {"vae": None}, scheduler=FlowMatchUniPCScheduler())
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match=r"pipe\.vae is None, and image needs it"):
        pipe(picture, "a", **SMALL, output_type="latent")
    absent = dict.fromkeys((*ENCODERS, "image_encoder", "image_processor"))
    encoders = WanI2VPipeline(**components | absent)
    expected = random_pipeline().encode_prompt("a", "fog")
    assert all(map(torch.equal, encoders.encode_prompt("a", "fog"), expected))


def test_settings_can_be_given(saved):
    assert load_pipeline(saved, boundary_ratio=0.9).config.boundary_ratio == 0.9


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(device_map, saved):
    pipe = load_pipeline(saved, device_map=device_map)
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline()))


def test_quantization_config(saved_bf16):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    config = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    mapping = {"transformer": config, "transformer_2": config}
    pipe = load_pipeline(
        saved_bf16, quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=mapping)
    )
    weight = pipe.transformer_2.blocks[0].attn1.to_q.weight
    assert type(weight).__module__.startswith("torchao")
    assert type(pipe.transformer.proj_out.weight) is torch.nn.Parameter  # a float32 island stays one
    reference = latents_of(load_pipeline(saved_bf16))
    assert 0 < (latents_of(pipe) - reference).norm() / reference.norm() < 0.1


@pytest.mark.parametrize("arguments", [{"token": "t", "max_memory": {0: "1GB"}}])
def test_other_arguments_reach_diffusers(arguments, saved, monkeypatch):
    """What needs an accelerator or a network is handed on as it is."""
    seen = {}

    def from_pretrained(cls, folder, **kwargs):
        seen.update(kwargs)
        return random_pipeline()

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    WanT2VPipeline.from_pretrained(saved, **arguments)
    assert {name: seen[name] for name in arguments} == arguments


# ---- from_pipe ----


def pointers(pipe):
    return {
        f"{name}.{key}": tensor.data_ptr()
        for name in MODELS
        if getattr(pipe, name) is not None
        for key, tensor in getattr(pipe, name).state_dict().items()
    }


def test_from_pipe_shares_the_weights(pipe):
    other = WanT2VPipeline.from_pipe(pipe)
    assert other is not pipe
    assert pointers(other) == pointers(pipe)
    assert other.config.boundary_ratio == 0.875
    other.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(other), latents_of(pipe))


def test_from_pipe_casts_nothing():
    pipe = bf16_pipeline()
    dtypes = {name: getattr(pipe, name).dtype for name in MODELS}
    other = WanT2VPipeline.from_pipe(pipe)
    assert {name: getattr(other, name).dtype for name in MODELS} == dtypes
    assert {name: getattr(pipe, name).dtype for name in MODELS} == dtypes
    assert dtypes["transformer"] == torch.bfloat16


def test_diffusers_from_our_pipe(pipe, saved):
    """And the way back: a diffusers pipeline on our models."""
    plain = diffusers.WanPipeline(**pipe.components, boundary_ratio=0.875)
    assert plain.transformer is pipe.transformer


def test_from_pipe_with_replacements(pipe):
    other = WanT2VPipeline.from_pipe(pipe, transformer_2=None, boundary_ratio=None)
    assert other.transformer_2 is None
    assert other.config.boundary_ratio is None
    with pytest.raises(TypeError, match=r"from_pipe has no argument sheduler; the nearest is scheduler"):
        WanT2VPipeline.from_pipe(pipe, sheduler=None)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_a_pipeline_holds_parts_of_its_own(copied):
    pipe = random_pipeline()
    expected = latents_of(pipe)
    twin = copied(pipe)
    del pipe
    gc.collect()
    assert torch.equal(latents_of(twin), expected)
    twin.accelerate()
    assert twin.acceleration.changes()["accelerated"]
    twin.decelerate()  # the models are those of other tests, too


def test_a_deleted_pipeline_is_free_at_once():
    pipe = random_pipeline()
    gone = weakref.ref(pipe)
    gc.disable()
    try:
        del pipe
        assert gone() is None
    finally:
        gc.enable()
