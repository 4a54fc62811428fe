"""LoRA scripts as they are written for diffusers: two calls for two experts, strengths, fusing, hotswap."""

import copy
import logging

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.accel.offload.recording import RecordingDevice
from tests.accel.planning.test_planner import plan_in
from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, make_lora, save
from wan22 import WanT2VPipeline
from wan22.checkpoints.lora.adapters import adapters_of

SLOTS = ("transformer", "transformer_2")
LORA = "pretrained_model_name_or_path_or_dict"


@pytest.fixture
def pipe():
    return copy.deepcopy(random_pipeline())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    pipe = random_pipeline()
    return {
        slot: save(make_lora(getattr(pipe, slot), i), folder / f"{slot}.safetensors")
        for i, slot in enumerate(SLOTS)
    }


@pytest.fixture(scope="module")
def plain():
    return latents_of(random_pipeline())


@pytest.fixture(scope="module")
def both(files):
    pipe = copy.deepcopy(random_pipeline())
    pipe.load_lora_weights(high=files["transformer"], low=files["transformer_2"])
    return latents_of(pipe)


def load_in_two_calls(pipe, files, names):
    first, second = names
    pipe.load_lora_weights(files["transformer"], adapter_name=first)
    pipe.load_lora_weights(files["transformer_2"], adapter_name=second, load_into_transformer_2=True)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a"), (None, None), ("wan2.2-lightning-v1.1", "train")])
def test_two_calls_are_a_pair(names, pipe, files, both, caplog):
    with caplog.at_level(logging.WARNING, "wan22"):
        load_in_two_calls(pipe, files, names)
    first, second = (name or "default_0" for name in names)
    assert f"{first} was loaded for both experts; as this call is for transformer_2 alone" in caplog.text
    assert pipe.get_list_adapters() == {"transformer": [first], "transformer_2": [second]}
    assert torch.equal(latents_of(pipe), both)
    pipe.set_adapters(list({first: 1, second: 1}), [1.0] * len({first, second}))
    assert torch.equal(latents_of(pipe), both)


def test_the_whole_script_with_fusing(pipe, files, both, plain):
    """As it is published for Lightning."""
    load_in_two_calls(pipe, files, ("high", "low"))
    pipe.set_adapters(["high", "low"], adapter_weights=[1.0, 1.0])
    pipe.fuse_lora(adapter_names=["high"], lora_scale=3.0, components=["transformer"])
    pipe.fuse_lora(adapter_names=["low"], lora_scale=1.0, components=["transformer_2"])
    assert (pipe.num_fused_loras, pipe.fused_loras) == (2, {"high", "low"})
    pipe.unload_lora_weights()
    expected = copy.deepcopy(random_pipeline())
    expected.load_lora_weights(high=files["transformer"], low=files["transformer_2"], strength=(3.0, 1.0))
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-5, atol=1e-5)
    recipe = pipe("a red circle", num_frames=5, height=32, width=32, num_inference_steps=2, seed=1).recipe
    assert [dict(lora.strengths) for lora in recipe.loras] == [{"transformer": 3.0}, {"transformer_2": 1.0}]
    assert [list(lora.files) for lora in recipe.loras] == [["transformer"], ["transformer_2"]]


def test_only_what_nobody_asked_for_is_withdrawn(pipe, files):
    pipe.load_lora_weights(high=files["transformer"], low=files["transformer"], adapter_name="asked")
    pipe.load_lora_weights(files["transformer"], adapter_name="into_both")
    pipe.load_lora_weights(files["transformer_2"], adapter_name="low", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {
        "transformer": ["asked", "into_both"],
        "transformer_2": ["asked", "low"],
    }
    with pytest.raises(ValueError, match="there is an adapter 'low' already"):
        pipe.load_lora_weights(files["transformer_2"], adapter_name="low", load_into_transformer_2=True)


def test_what_stays_fused_counts_as_it_did_when_another_is_withdrawn(pipe, files):
    pipe.load_lora_weights(low=files["transformer"], adapter_name="asked")
    pipe.load_lora_weights(files["transformer"], adapter_name="into_both", strength=0.0)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.load_lora_weights(files["transformer_2"], "low", load_into_transformer_2=True)
    assert adapters_of(pipe.transformer_2).strengths() == {"asked": 0.5, "low": 1.0}


def test_two_experts_that_are_one_model(pipe, files):
    pipe.transformer_2 = pipe.transformer
    for options in (
        {"high": files["transformer"], "low": files["transformer_2"]},
        {LORA: files["transformer"], "strength": (1.0, 0.5)},
    ):
        with pytest.raises(ValueError, match="transformer and transformer_2 are one and the same model"):
            pipe.load_lora_weights(**options)
    pipe.load_lora_weights(files["transformer"], "a")
    with pytest.raises(ValueError, match="transformer and transformer_2 are one and the same model"):
        pipe.set_adapters("a", (1.0, 0.5))
    assert adapters_of(pipe.transformer).strengths() == {"a": 1.0}


def test_there_is_no_second_expert(files):
    pipe = copy.deepcopy(random_pipeline(experts=1))
    with pytest.raises(ValueError, match="a LoRA for transformer_2, which is not loaded"):
        pipe.load_lora_weights(files["transformer"], load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {}


def test_it_is_diffusers_mixin(pipe, files):
    assert isinstance(pipe, diffusers.loaders.WanLoraLoaderMixin)
    assert WanT2VPipeline._lora_loadable_modules == list(SLOTS)
    state = WanT2VPipeline.lora_state_dict(
        str(files["transformer"].parent), weight_name="transformer.safetensors"
    )
    assert all("lora_" in name for name in state)
    options = {"low_cpu_mem_usage": True, "use_safetensors": True}
    pipe.load_lora_weights(pretrained_model_name_or_path_or_dict=files["transformer"], **options)
    assert pipe.get_active_adapters() == ["default_0"]


def test_strengths_as_diffusers_takes_them(pipe, files, caplog):
    pipe.load_lora_weights(files["transformer"], "a")
    pipe.load_lora_weights(files["transformer_2"], "b")

    def strengths():
        return {slot: adapters_of(getattr(pipe, slot)).strengths() for slot in SLOTS}

    for names, weights, high, low in (
        ("a", None, {"a": 1.0}, {"a": 1.0}),
        ("a", 0.5, {"a": 0.5}, {"a": 0.5}),
        ("a", [0.5], {"a": 0.5}, {"a": 0.5}),
        ("a", (0.5, 0.25), {"a": 0.5}, {"a": 0.25}),
        (["a", "b"], [0.5, None], {"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 1.0}),
        (["a", "b"], [{"transformer": 0.5}, (1, 0)], {"a": 0.5, "b": 1.0}, {"a": 1.0}),
    ):
        pipe.set_adapters(names, weights)
        assert strengths() == {"transformer": high, "transformer_2": low}
    for weights in ({"transformer": {"blocks.0": 0.1}}, {"blocks.0": 0.1}):
        pipe.set_adapters("a", weights)
        table = strengths()["transformer"]["a"]
        assert (table["blocks.0.attn1.to_q"], table["blocks.1.attn1.to_q"]) == (0.1, 1.0)
        second = strengths()["transformer_2"]["a"]
        assert second == (1.0 if "transformer" in weights else table)
    with caplog.at_level(logging.WARNING):
        pipe.set_adapters("a", {"unet": 0.1, "transformer": 0.5})
    assert "components in `adapter_weights` are not part of the pipeline: ['unet']" in caplog.text
    assert strengths()["transformer"] == {"a": 0.5}


def test_a_recipe_with_strengths_by_block(pipe, files):
    pipe.load_lora_weights(files["transformer"])
    pipe.set_adapters("default_0", {"transformer": {"blocks.0": 0.25}})
    call = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "seed": 1}
    video = pipe("a red circle", **call)
    (lora,) = video.recipe.loras
    assert lora.strengths["transformer"]["blocks.0.ffn.net.2"] == 0.25
    assert lora.strengths["transformer_2"] == 1.0
    other = copy.deepcopy(random_pipeline())
    other.load_lora_weights(files["transformer"], strength=dict(lora.strengths))
    assert (other.reproduce(video.recipe).frames == video.frames).all()
    other.set_adapters("default_0")
    with pytest.raises(ValueError, match="the recipe has LoRAs"):
        other.reproduce(video.recipe)


def test_what_the_transformer_was_told_last_is_in_the_recipe(pipe, files):
    pipe.load_lora_weights(files["transformer"])
    pipe.transformer.set_adapters("default_0", 0.3)
    pipe.transformer_2.disable_lora()
    call = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "seed": 1}
    (lora,) = pipe("a red circle", **call).recipe.loras
    assert dict(lora.strengths) == {"transformer": 0.3}


def test_fusing_by_component(pipe, files, both, plain):
    pipe.load_lora_weights(high=files["transformer"], low=files["transformer_2"])
    pipe.fuse_lora(["transformer"])
    fused = [adapters_of(getattr(pipe, slot)).fused for slot in SLOTS]
    assert fused == [{"default_0"}, set()]
    torch.testing.assert_close(latents_of(pipe), both, rtol=1e-5, atol=1e-5)
    pipe.fuse_lora()
    pipe.unfuse_lora(components=["transformer_2"])
    assert [adapters_of(getattr(pipe, slot)).fused for slot in SLOTS] == fused
    pipe.unfuse_lora()
    assert torch.equal(latents_of(pipe), both)
    for wrong in ([], ["text_encoder"]):
        with pytest.raises(ValueError, match="must be of transformer and transformer_2"):
            pipe.fuse_lora(components=wrong)
    with pytest.raises(ValueError, match="'b' is not in the list of present adapters: default_0"):
        pipe.fuse_lora(adapter_names=["b"])
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


def test_a_pipeline_with_fused_loras_is_saved(pipe, files, both, tmp_path):
    pipe.load_lora_weights(high=files["transformer"], low=files["transformer_2"])
    with pytest.raises(ValueError, match="the LoRA default_0 is active"):
        pipe.save_pretrained(tmp_path / "refused")
    pipe.save_pretrained(tmp_path / "merged", merge_lora=True)
    assert torch.equal(latents_of(pipe), both)
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    for name in ("merged", "fused"):
        again = WanT2VPipeline.from_pretrained(tmp_path / name)
        torch.testing.assert_close(latents_of(again), both, rtol=1e-5, atol=1e-5)
        theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / name, subfolder="transformer")
        assert theirs.state_dict().keys() == again.transformer.state_dict().keys()


def test_the_models_methods_under_a_memory_plan(pipe, files):
    """They edit the weights on the host, and a call's scale must not."""
    delta = torch.full_like(pipe.transformer.blocks[0].attn1.to_q.bias, 0.1)
    difference = {"diffusion_model.blocks.0.self_attn.q.diff_b": delta}
    pipe.load_lora_weights(load_file(files["transformer"]) | difference)
    expected = {}
    for strength in (1.0, 0.2):
        pipe.set_adapters("default_0", strength)
        expected[strength] = latents_of(pipe)
    pipe.apply(plan_in(pipe, 1e9), RecordingDevice())
    assert torch.equal(latents_of(pipe), expected[0.2])
    for model in pipe.transformers:
        model.set_adapters("default_0", 1.0)
    assert torch.equal(latents_of(pipe), expected[1.0])
    for model in pipe.transformers:
        model.fuse_lora()
    torch.testing.assert_close(latents_of(pipe), expected[1.0], rtol=1e-5, atol=1e-5)
    pipe.release()
    torch.testing.assert_close(latents_of(pipe), expected[1.0], rtol=1e-5, atol=1e-5)
    pipe.unfuse_lora()
    assert torch.equal(latents_of(pipe), expected[1.0])
    pipe.apply(plan_in(pipe, 1e9), RecordingDevice())
    with pytest.raises(ValueError, match="scale cannot change a LoRA with whole differences while a memory"):
        latents_of(pipe, attention_kwargs={"scale": 0.5})


# ---- hotswap ----


@pytest.mark.parametrize("padded", [True, False])
def test_hotswap(padded, pipe, files):
    table = make_lora(pipe.transformer, 7, share=0.5)  # of fewer layers
    new = DIALECTS["diffusion_model, alpha"](table)
    expected = copy.deepcopy(random_pipeline())
    expected.load_lora_weights(new, strength=0.5)
    if padded:
        pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(files["transformer"], "a")
    shapes = {name: p.shape for name, p in pipe.transformer.named_parameters()}
    pipe.load_lora_weights(new, "a", hotswap=True, strength=0.5)
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-5, atol=1e-5)
    assert pipe.get_list_adapters() == {slot: ["a"] for slot in SLOTS}
    if padded:
        assert {name: p.shape for name, p in pipe.transformer.named_parameters()} == shapes
        matrix = pipe.transformer.blocks[0].attn1.to_q.lora_A["a"].weight
        assert matrix.shape[0] == 8
        assert isinstance(pipe.transformer.blocks[0].attn1.to_q.scaling["a"], torch.Tensor)


def test_hotswap_leaves_other_adapters(pipe, files, both):
    """A name that stands in every key is no reason to change others."""
    pipe.load_lora_weights(high=files["transformer"], low=files["transformer_2"], adapter_name="kept")
    pipe.load_lora_weights(files["transformer"], "a")
    pipe.load_lora_weights(files["transformer_2"], "a", hotswap=True)
    pipe.set_adapters("kept")
    assert torch.equal(latents_of(pipe), both)


def test_hotswapping_what_only_one_expert_has(pipe, files):
    pipe.load_lora_weights(high=files["transformer"], adapter_name="a")
    with pytest.raises(ValueError, match="transformer_2 has no adapter 'a' to be replaced"):
        pipe.load_lora_weights(
            high=files["transformer"], low=files["transformer"], adapter_name="a", hotswap=True
        )
    pipe.load_lora_weights(files["transformer_2"], "a", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["a"]}


def test_hotswap_is_refused(pipe, files):
    with pytest.raises(ValueError, match="'a' must be loaded; there is none"):
        pipe.load_lora_weights(files["transformer"], "a", hotswap=True)
    small = DIALECTS["diffusion_model, alpha"](make_lora(pipe.transformer, 7, share=0.5))
    pipe.load_lora_weights(small, "a")
    with pytest.raises(ValueError, match=r"the loaded adapter lacks blocks\.1"):
        pipe.load_lora_weights(files["transformer"], "a", hotswap=True)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="the adapter is fused"):
        pipe.load_lora_weights(small, "a", hotswap=True)
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        pipe.enable_lora_hotswap()
