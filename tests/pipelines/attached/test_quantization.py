"""Quantisation by expert and by block: which layers, what recipes tell of it, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from tests.builders import SMALL, latents_of, random_pipeline, random_transformer
from wan22 import Quantization, WanT2VPipeline, accel
from wan22.accel.offload.layout import blocks_of, bytes_of
from wan22.accel.quantization.layers import formats_of, plain_blocks
from wan22.accel.quantize import quantize, report
from wan22.checkpoints.quantized_linear import QuantizedLinear

SLOTS = ("transformer", "transformer_2")
SETTINGS = ("int8", "int8:low", "int8:high:keep=2,1")


def own(blocks=4):
    """A pipeline with transformers of its own, with more blocks."""
    models = {slot: copy.deepcopy(random_transformer(i)) for i, slot in enumerate(SLOTS)}
    for model in models.values():
        model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(blocks - 2))
    pipe = random_pipeline(**models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def test_one_expert_and_then_the_other():
    pipe, both = own(), own()
    high = copy.deepcopy(pipe.transformer.state_dict())
    pipe.quantize("int8", only="low")
    assert not layers(pipe.transformer) and len(layers(pipe.transformer_2)) == 40
    assert all(torch.equal(w, high[name]) for name, w in pipe.transformer.state_dict().items())
    assert pipe.acceleration.changes()["quantized"] == {"transformer_2": {"int8": 40}}
    pipe.quantize("int8:low")  # what is quantised stays as it is
    pipe.quantize("fp8", only="transformer")
    assert pipe.acceleration.changes()["quantized"] == {
        "transformer": {"fp8": 40},
        "transformer_2": {"int8": 40},
    }
    quantize(both.transformer, "fp8")
    quantize(both.transformer_2, "int8")
    assert torch.equal(latents_of(pipe), latents_of(both))
    with pytest.raises(ValueError, match=r"quantised already \(int8\), and fp8 would round it twice"):
        pipe.quantize("fp8")


@pytest.mark.parametrize("keep", [(1, 0), (0, 1), (2, 1), 1])
def test_first_and_last_blocks_stay_as_they_are(keep):
    first, last = keep if isinstance(keep, tuple) else (keep, keep)
    pipe, whole = own(), own()
    pipe.quantize("int8", keep_blocks=keep)
    whole.quantize("int8")
    kept = [*range(first), *range(4 - last, 4)]
    for slot in SLOTS:
        model, all_of_it = getattr(pipe, slot), getattr(whole, slot)
        assert plain_blocks(model) == kept
        assert layers(model) == {n for n in layers(all_of_it) if int(n.split(".")[1]) not in kept}
        for name in layers(model):
            assert torch.equal(model.get_submodule(name).values(), all_of_it.get_submodule(name).values())
    pipe.quantize("int8", keep_blocks=keep)
    for other in ("int8", "int8:keep=2,0" if keep != (2, 0) else "int8:keep=0,2", "fp8"):
        with pytest.raises(ValueError, match=r"quantised already \(int8, blocks kept: .*\), and"):
            pipe.quantize(other)


def test_what_cannot_be_quantised_so():
    pipe = own()
    with pytest.raises(ValueError, match=r"keep_blocks=\(2, 2\) leaves none of the 4 blocks to quantise"):
        pipe.quantize("fp8", keep_blocks=2)
    with pytest.raises(ValueError, match="only='low' names an expert of a pipeline"):
        quantize(pipe.transformer, "fp8:low")
    assert pipe.acceleration.changes() == {}
    alone = random_pipeline(
        transformer=copy.deepcopy(random_transformer(1)), transformer_2=None, boundary_ratio=None
    )
    with pytest.raises(ValueError, match="only='low': transformer_2 is not loaded"):
        alone.quantize("fp8", only="low")
    alone.quantize("fp8", only="high")
    assert layers(alone.transformer)


def test_recipes_tell_them_apart():
    """By expert, and by the blocks that are kept; the same settings make the same video."""
    settings = ["int8", "int8:low", "int8:high", "int8:keep=1,0", "int8:keep=0,1", "int8:low:keep=1,0"]
    pipes = {}
    for text in settings:
        pipes[text] = own()
        pipes[text].quantize(text)
    made = {text: pipe("a", seed=1, output_type="latent", **SMALL) for text, pipe in pipes.items()}
    for text, video in made.items():
        for other, pipe in pipes.items():
            if other == text:
                again = pipe.reproduce(video.recipe, output_type="latent").frames
                assert torch.equal(again, video.frames)
            else:
                with pytest.raises(ValueError, match="the recipe was made with changes"):
                    pipe.provenance.check(video.recipe)


@pytest.mark.parametrize("text", ["int8:low", "fp8:high:keep=1,0"])
@pytest.mark.parametrize("memory", [None, "auto"])
def test_as_it_is_loaded(text, memory, tmp_path):
    own(2).save_pretrained(tmp_path)
    expected = own(2)
    expected.quantize(text)
    for quantization in (text, Quantization.of(text)):
        pipe = WanT2VPipeline.from_pretrained(tmp_path, quantize=quantization, memory=memory)
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(pipe), latents_of(expected))
        assert {s: formats_of(getattr(pipe, s)) for s in SLOTS} == {
            s: formats_of(getattr(expected, s)) for s in SLOTS
        }


OPTIONS = {"height": 32, "width": 32, "num_frames": 5, "ram": "8GB"}


def test_plans_count_what_stays_as_it_is():
    """As if it were quantised already."""
    pipe = own(6)
    plans = {text: accel.plan(pipe, quantize=text, vram="2GB", **OPTIONS) for text in (None, *SETTINGS)}
    for text in SETTINGS:
        done = own(6)
        done.quantize(text)
        expected = accel.plan(done, vram="2GB", **OPTIONS)
        assert plans[text].phases == expected.phases
        assert plans[text].phases[1].weights < plans[None].phases[1].weights
    assert "int8:low, which changes the result" in str(plans["int8:low"])
    found = accel.plan(pipe, quantize="int8:high:keep=1,2", device="cpu", **OPTIONS)
    pipe.apply(found)
    assert plain_blocks(pipe.transformer) == [0, 4, 5] and not layers(pipe.transformer_2)


def test_an_expanded_weight_is_there_in_one_block_at_a_time():
    """However many blocks are quantised, and wherever the first of them is."""
    pipe = own(6)
    for block in (block for slot in SLOTS for block in getattr(pipe, slot).blocks):
        block.ffn.net[0].proj, block.ffn.net[2] = nn.Linear(48, 16384), nn.Linear(16384, 48)
    plans = {text: accel.plan(pipe, quantize=text, vram="2GB", **OPTIONS) for text in (None, *SETTINGS)}
    steps = {text: plan.phases[1].activations for text, plan in plans.items()}
    weight = pipe.transformer.blocks[0].ffn.net[2].weight.nbytes
    assert all(weight / 2 < steps[text] - steps[None] < 2 * weight for text in SETTINGS)
    assert len({steps[text] for text in SETTINGS}) == 1


@pytest.mark.parametrize("text", ["int8:low", "int8:high"])
def test_streaming_leaves_room_for_the_larger_expert(text):
    pipe = own(6)
    full = accel.plan(pipe, vram=2 * 10**9, quantize=text, **OPTIONS)
    context = 2 * 10**9 - full.machine.vram
    budget = full.phases[1].activations + bytes_of(pipe.transformer) * 3 // 4
    plan = accel.plan(pipe, vram=context + budget, quantize=text, **OPTIONS)
    assert plan.placements["transformer"].kind == "streamed" and plan.device_peak <= budget


def test_the_report_says_what_was_kept(capsys):
    plain = own().transformer
    model = quantize(copy.deepcopy(plain), "fp8", keep_blocks=(1, 0))
    found = report(plain, model, size=(2, 4, 6), tokens=7)
    assert found.layers.keys() == layers(model) and found.kept == "0" and found.first == 1
    all_of_it = report(plain, quantize(copy.deepcopy(plain), "fp8"), size=(2, 4, 6), tokens=7)
    assert 0 < found.output < all_of_it.output and found.block > 0
    told = capsys.readouterr().out
    assert f"block 1  {found.block:.1e}" in told and "kept     blocks 0" in told


def test_blocks_are_counted_in_the_text_encoder_too():
    encoder = copy.deepcopy(random_pipeline().text_encoder)
    quantize(encoder, "int8", keep_blocks=(1, 0))
    assert plain_blocks(encoder) == [0] and len(blocks_of(encoder)) == 2
