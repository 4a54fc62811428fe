"""LoRAs in both experts: every dialect computes what the merged weights compute, and goes without a trace."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, make_lora, save
from tests.pipelines.attached.merged_loras import LORA, SLOTS, close, merge, merged
from wan22 import FlowMatchEulerScheduler, WanT2VPipeline, WanTransformer3DModel, tiny_checkpoint

# ---- dialects ----


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect(dialect, pipe, tables, both, plain, tmp_path):
    assert (both - plain).norm() > 0.02 * plain.norm()
    high, low = (save(tables[slot], tmp_path / f"{slot}.safetensors", dialect) for slot in SLOTS)
    pipe.load_lora_weights(high=high, low=str(low))
    close(latents_of(pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)
    assert type(pipe.transformer.blocks[0].attn1.to_q) is torch.nn.Linear


@pytest.mark.parametrize("dialect", ["diffusion_model, alpha", "musubi"])
def test_a_partial_file(dialect, pipe, tmp_path):
    table = make_lora(pipe.transformer, 5, share=0.3)
    pipe.load_lora_weights(save(table, tmp_path / "w.safetensors", dialect))
    close(latents_of(pipe), merged((1, 1), {slot: table for slot in SLOTS}))


def test_differences_of_norms_biases_and_modulation(pipe, plain, tmp_path):
    torch.manual_seed(3)
    parameters = pipe.transformer.state_dict()
    keys = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff_b": "proj_out.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff": "condition_embedder.time_proj.weight",
    }
    deltas = {ours: torch.randn_like(parameters[ours]) * 0.1 for ours in keys.values()}
    table = make_lora(pipe.transformer, 5, share=0.3)
    file = DIALECTS["diffusion_model, alpha"](table)
    file |= {f"diffusion_model.{key}": deltas[ours] for key, ours in keys.items()}
    save_file(file, tmp_path / "w.safetensors")
    name = pipe.load_lora_weights(tmp_path / "w.safetensors", strength=0.7)
    assert name == "default_0"
    expected = merged((0.7, 0.7), {slot: table for slot in SLOTS}, deltas)
    close(latents_of(pipe), expected)
    pipe.set_adapters(name, (0.0, 0.7))
    close(latents_of(pipe), merged((0, 0.7), {slot: table for slot in SLOTS}, deltas))
    pipe.disable_lora()
    assert torch.equal(latents_of(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters(name, 0.7)
    close(latents_of(pipe), expected)
    pipe.delete_adapters(name)
    assert torch.equal(latents_of(pipe), plain)


def test_changes_of_the_time_projection_are_not_rounded(tmp_path):
    model = WanTransformer3DModel.from_pretrained(tiny_checkpoint(), subfolder="transformer")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    slots = dict.fromkeys(SLOTS, WanTransformer3DModel.from_pretrained(tmp_path))
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint(), **slots)
    layer = pipe.transformer.condition_embedder.time_proj
    assert layer.weight.dtype == torch.bfloat16
    before, delta = layer.weight.float(), torch.full_like(layer.weight, 1e-5, dtype=torch.float32)
    pipe.load_lora_weights({"diffusion_model.time_projection.1.diff": delta})
    assert torch.equal(layer.weight, before + delta)
    pipe.unload_lora_weights()
    assert torch.equal(layer.weight, before)


def test_one_file_that_names_both_experts(pipe, tables, both, tmp_path):
    file = {}
    for slot in SLOTS:
        pairs = DIALECTS["diffusers"](tables[slot])
        file |= {key.replace("transformer.", f"{slot}.", 1): w for key, w in pairs.items()}
    path = tmp_path / "w.safetensors"
    save_file(file, path)
    pipe.load_lora_weights(path)
    close(latents_of(pipe), both)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(high=path, low=path)
    close(latents_of(pipe), both)


def test_a_file_that_names_the_first_expert(pipe, tables):
    """By the official folder's name: "transformer." is what diffusers writes before either's."""
    pairs = DIALECTS["no prefix"](tables["transformer"])
    pipe.load_lora_weights({f"high_noise_model.{key}": w for key, w in pairs.items()})
    close(latents_of(pipe), merged((1, 0), dict.fromkeys(SLOTS, tables["transformer"])))


def test_a_file_that_names_the_second_expert(pipe, tables, tmp_path):
    """It is for that one alone; given as high= or low= it is for the one it is given for."""
    pairs = DIALECTS["diffusers"](tables["transformer"])
    path = tmp_path / "w.safetensors"
    save_file({key.replace("transformer.", "transformer_2.", 1): w for key, w in pairs.items()}, path)
    both = dict.fromkeys(SLOTS, tables["transformer"])
    for arguments, strengths in (({LORA: path}, (0, 1)), ({"low": path}, (0, 1)), ({"high": path}, (1, 0))):
        pipe.load_lora_weights(**arguments)
        close(latents_of(pipe), merged(strengths, both))
        pipe.unload_lora_weights()
    one = copy.deepcopy(random_pipeline(experts=1))
    with pytest.raises(ValueError, match="a LoRA for transformer_2, which is not loaded"):
        one.load_lora_weights(path)


def test_an_alpha_beside_a_whole_difference(pipe, tables, caplog):
    """Some programs write one; it means nothing there."""
    file = DIALECTS["full differences"](tables["transformer"])
    module = next(iter(tables["transformer"]))
    file[f"diffusion_model.{module}.alpha"] = torch.tensor(4.0)
    pipe.load_lora_weights(file)
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer"])))
    assert not caplog.records


def test_a_table_in_memory_is_not_changed(pipe, tables, both):
    files = [DIALECTS["no prefix"](tables[slot]) for slot in SLOTS]
    before = [{key: w.clone() for key, w in file.items()} for file in files]
    pipe.load_lora_weights(high=files[0], low=files[1])
    close(latents_of(pipe), both)
    pipe.set_adapters("default_0", 0.3)
    for file, old in zip(files, before, strict=True):
        assert file.keys() == old.keys()
        assert all(torch.equal(file[key], old[key]) for key in file)


def test_a_patch_embedding(pipe, tmp_path):
    """A convolution's pair, as PEFT and musubi-tuner write it."""
    weight = pipe.transformer.patch_embedding.weight
    torch.manual_seed(0)
    down, up = torch.randn(2, *weight.shape[1:]) * 0.2, torch.randn(weight.shape[0], 2, 1, 1, 1) * 0.2
    file = {"diffusion_model.patch_embedding.lora_down.weight": down}
    save_file(file | {"diffusion_model.patch_embedding.lora_up.weight": up}, tmp_path / "w.safetensors")
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    delta = {"patch_embedding.weight": torch.einsum("or...,rcthw->octhw", up[:, :, 0, 0, 0], down)}
    close(latents_of(pipe), merged((1, 1), {slot: {} for slot in SLOTS}, delta))


# ---- adapters ----


def test_strengths_per_expert(pipe, tables, tmp_path):
    high, low = (save(tables[slot], tmp_path / f"{slot}.safetensors") for slot in SLOTS)
    pipe.load_lora_weights(high=high, low=low, adapter_name="a", strength=(0.5, 2.0))
    close(latents_of(pipe), merged((0.5, 2), tables))
    pipe.set_adapters("a", {"transformer": 1.5, "transformer_2": 0})
    close(latents_of(pipe), merged((1.5, 0), tables))
    pipe.set_adapters(["a"], [0.25])
    close(latents_of(pipe), merged((0.25, 0.25), tables))


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_scale_for_one_call_leaves_the_strengths(scale, pipe, tables, tmp_path):
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"), strength=0.5)
    before = latents_of(pipe)
    both = dict.fromkeys(SLOTS, tables["transformer"])
    close(latents_of(pipe, attention_kwargs={"scale": scale}), merged((0.5 * scale, 0.5 * scale), both))
    assert torch.equal(latents_of(pipe), before)


def test_two_adapters(pipe, tables, plain, tmp_path):
    others = {slot: make_lora(getattr(pipe, slot), 9, share=0.5) for slot in SLOTS}
    for name, pair in (("a", tables), ("b", others)):
        high, low = (save(pair[slot], tmp_path / f"{name}{slot}.safetensors") for slot in SLOTS)
        assert pipe.load_lora_weights(high=high, low=low, adapter_name=name) == name
    expected = copy.deepcopy(random_pipeline())
    for slot in SLOTS:
        merge(getattr(expected, slot), tables[slot])
        merge(getattr(expected, slot), others[slot])
    close(latents_of(pipe), latents_of(expected))
    assert pipe.get_list_adapters() == {slot: ["a", "b"] for slot in SLOTS}
    assert pipe.get_active_adapters() == ["a", "b"]
    pipe.set_adapters("a")
    close(latents_of(pipe), merged((1, 1), tables))
    assert pipe.get_active_adapters() == ["a"]
    pipe.set_adapters(["a", "b"], [0, 1])
    close(latents_of(pipe), merged((1, 1), others))
    pipe.delete_adapters("b")
    assert torch.equal(latents_of(pipe), plain), "what is left, a, has strength 0"
    pipe.set_adapters("a")
    close(latents_of(pipe), merged((1, 1), tables))


# ---- few steps ----


def test_the_lightning_recipe(pipe):
    seen = []
    for slot in SLOTS:
        hook = lambda model, args, kwargs: seen.append(kwargs["timestep"].flatten()[0].item())  # noqa: E731
        getattr(pipe, slot).register_forward_pre_hook(hook, with_kwargs=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "seed": 7, "output_type": "latent"}
    video = pipe("a red circle", distilled="lightning-4", **size)
    assert seen == pytest.approx([1000, 937.5, 2500 / 3, 625]), "one call a step: there is no guidance"
    assert video.recipe.scheduler == "FlowMatchEulerScheduler"
    assert (video.recipe.guidance_scale, video.recipe.guidance_scale_2) == (1.0, 1.0)
    pipe.scheduler = FlowMatchEulerScheduler(shift=5.0)
    by_hand = pipe("a red circle", timesteps=[1000, 937.5, 2500 / 3, 625], guidance_scale=1.0, **size)
    assert torch.equal(video.frames, by_hand.frames)
    with pytest.raises(ValueError, match=r"distilled='lightning-8' .*lightning-4"):
        pipe("a red circle", distilled="lightning-8", **size)
    with pytest.raises(ValueError, match="has its own timesteps; leave num_inference_steps out"):
        pipe("a red circle", distilled="lightning-4", num_inference_steps=8, **size)
