"""Where the weights lie changes nothing: offloaded, cached, compiled, cast for storage, replaced."""

import copy
import json

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from tests.builders import SMALL, load_pipeline, random_components, random_pipeline
from tests.checkpoints import writers
from wan22 import WanT2VPipeline, WanTransformer3DModel
from wan22.checkpoints.naming.keys import TRANSFORMER

MODELS = ("text_encoder", "transformer", "transformer_2", "vae")


def own_pipeline() -> WanT2VPipeline:
    """A pipeline whose models may be changed."""
    return random_pipeline(**{name: copy.deepcopy(random_components()[name]) for name in MODELS})


def frames(pipe: WanT2VPipeline, prompt="a", **kwargs) -> torch.Tensor:
    return pipe(prompt, output_type="pt", **SMALL | {"seed": 0} | kwargs).frames


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return frames(random_pipeline())


def test_sequential_offload(plain):
    pipe = own_pipeline()
    for name in MODELS:
        accelerate.cpu_offload(getattr(pipe, name), execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).device.type == "meta"
    assert torch.equal(frames(pipe), plain)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(plain, kind):
    pipe = own_pipeline()
    for name in MODELS:
        apply_group_offloading(
            getattr(pipe, name),
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
        )
    assert torch.equal(frames(pipe), plain)


def offload_one_by_one(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_in_groups(model):
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_one_by_one, offload_in_groups])
def test_quantised_weights_are_offloaded_compiled_and_saved(offload, tmp_path):
    """In scaled float8: the same videos, and saved in the Diffusers layout they are ordinary weights."""
    pipe = own_pipeline()
    official = {TRANSFORMER.inverse.rename(name): w for name, w in pipe.transformer.state_dict().items()}
    writers.grouped(official, tmp_path / "w.safetensors")
    options = {"dtype": torch.float32, "attention_head_dim": pipe.transformer.config.attention_head_dim}
    pipe.transformer = WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors", **options)
    expected = frames(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(frames(load_pipeline(tmp_path / "saved")), expected, rtol=0, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    x = torch.randn(1, 16, 2, 4, 4)
    arguments = (x, torch.tensor([500.0]), torch.randn(1, 3, pipe.transformer.config.text_dim))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments).sample, pipe.transformer(*arguments).sample)
    offload(pipe.transformer)
    assert torch.equal(frames(pipe), expected)


def test_compiled_transformers_run_and_are_saved_as_what_they_are(plain, tmp_path):
    torch._dynamo.reset()
    pipe = own_pipeline()
    for name in ("transformer", "transformer_2"):
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager", fullgraph=True))
    torch.testing.assert_close(frames(pipe), plain, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]


def test_layerwise_casting_of_a_model_stored_in_float32(plain):
    pipe = own_pipeline()
    for model in (pipe.transformer, pipe.transformer_2):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    error = (frames(pipe) - plain).abs().mean()
    assert 0 < error < 0.05


def test_a_step_cache_does_not_mix_the_videos_of_a_batch():
    pipe = own_pipeline()
    for model in (pipe.transformer, pipe.transformer_2):
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    together = frames(pipe, ["a", "something else"])
    for model in (pipe.transformer, pipe.transformer_2):
        model.disable_cache()
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    assert torch.equal(together[1:], frames(pipe, "something else", seed=1))


def test_components_assigned_later_are_checked():
    pipe = own_pipeline()
    pipe.transformer = random_components(1, 48)["transformer"]
    with pytest.raises(ValueError, match="48 latent channels, the VAE has 16"):
        frames(pipe)


def test_another_vae_is_refused_by_name():
    with pytest.raises(ValueError, match="vae must be an AutoencoderKLWan, not Linear"):
        random_pipeline(vae=torch.nn.Linear(1, 1))


def test_a_scheduler_that_is_not_set_to_flow_matching_is_refused():
    pipe = random_pipeline(scheduler=diffusers.UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="use_flow_sigmas=True"):
        frames(pipe)


def test_text_alone_without_transformers(tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    pipe = WanT2VPipeline.from_pretrained(tmp_path, transformer=None, transformer_2=None)
    embeds, negative = pipe.encode_prompt("a")
    assert embeds.shape == negative.shape
    with pytest.raises(ValueError, match="neither transformer nor transformer_2 is loaded"):
        pipe("a")


def test_a_checkpoint_of_another_task_is_refused_before_loading(tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanImageToVideoPipeline"}))
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="for WanImageToVideoPipeline; use WanI2VPipeline"):
        WanT2VPipeline.from_pretrained(tmp_path)


def test_streams_keep_no_gradients():
    vae = random_components()["vae"]
    assert next(vae.parameters()).requires_grad
    assert not any(chunk.requires_grad for chunk in vae.decode_stream(torch.randn(1, 16, 2, 4, 4)))
    assert not any(p.parameters.requires_grad for p in vae.encode_stream([torch.randn(1, 3, 5, 32, 32)]))
