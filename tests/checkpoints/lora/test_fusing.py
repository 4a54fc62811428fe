"""Fused adapters are in the weights, and come out of them to the bit."""

import copy
import logging

import peft
import pytest
import torch
from torch import nn

from tests.checkpoints.lora.models import close, differences, load, merged, model_without, run
from tests.checkpoints.lora_writers import make_lora
from wan22.accel.quantize import quantize
from wan22.checkpoints.lora.adapters import adapters_of
from wan22.checkpoints.quantized_linear import QuantizedLinear


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_fusing_and_back(model, table):
    by_file, deltas = differences(model)
    expected, before = run(merged(model, table, 0.7, deltas)), weights_of(model)
    load(model, table, strength=0.7, deltas=by_file)
    unfused = run(model)
    model.fuse_lora()
    close(run(model), expected)
    assert adapters_of(model).strengths() == {"a": 0.7}
    model.set_adapters("a", 0.2)
    close(run(model), expected), "as in diffusers, what is fused stays as it is"
    assert adapters_of(model).strengths() == {"a": 0.7}
    model.set_adapters("a", 0.7)
    model.unfuse_lora()
    assert torch.equal(run(model), unfused)
    model.unload_lora()
    assert same(weights_of(model), before)


def test_unloading_keeps_what_is_fused(model, table):
    by_file, deltas = differences(model)
    expected = run(merged(model, table, 1.0, deltas))
    load(model, table, deltas=by_file)
    model.fuse_lora()
    model.unload_lora()
    close(run(model), expected)
    assert adapters_of(model).names == []
    assert adapters_of(model).strengths() == {"a": 1.0}, "the weights have it, whatever is loaded"
    assert adapters_of(model).fused_weights() == [], "nothing is kept"
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    model.unfuse_lora()
    close(run(model), expected)


def test_strengths_that_change_while_fused_count_afterwards(model, table):
    by_file, deltas = differences(model)
    expected = run(merged(model, table, 0.2, deltas))
    load(model, table, deltas=by_file)
    model.fuse_lora()
    model.set_adapters("a", 0.2)
    model.unfuse_lora()
    close(run(model), expected)


def test_a_name_again_after_fusing(model, table):
    other = make_lora(model, 2)
    load(model, table, strength=0.5)
    model.fuse_lora()
    model.unload_lora()
    load(model, other, strength=0.25)
    assert adapters_of(model).strengths() == {"a": 0.5, "a (2)": 0.25}
    model.fuse_lora()
    model.unload_lora()
    assert adapters_of(model).strengths() == {"a": 0.5, "a (2)": 0.25}
    assert adapters_of(model).in_weights == {"a"}


def test_scale_and_names(model, table):
    other = make_lora(model, 2)
    both = run(merged(merged(model, table, 0.5), other, 0.5))
    first, plain = run(merged(model, table, 0.25)), run(model)
    load(model, table)
    load(model, other, "b")
    for name in ("a", "b"):
        model.fuse_lora(lora_scale=0.5, adapter_names=[name])
    assert adapters_of(model).fused == {"a", "b"}
    close(run(model), both)
    model.unfuse_lora()
    model.set_adapters(["a", "b"], [0.5, 0.5])
    assert adapters_of(model).strengths() == {"a": 0.5, "b": 0.5}
    model.fuse_lora(lora_scale=0.5, adapter_names=["a"])
    assert adapters_of(model).strengths() == {"a": 0.25}
    close(run(model), first)
    model.disable_lora()
    assert torch.equal(run(model), plain)
    assert adapters_of(model).fused == set()


def test_loading_after_fusing(model, table, caplog):
    """PEFT's layers compute with what is merged alone, so it is taken out and both are active."""
    other = make_lora(model, 2)
    both, plain = run(merged(merged(model, table, 0.5), other)), run(model)
    load(model, table)
    model.fuse_lora(lora_scale=0.5)
    with caplog.at_level(logging.INFO, "wan22"):
        load(model, other, "b")
    assert "a is not fused any more, so that b counts beside it" in caplog.text
    assert adapters_of(model).strengths() == {"a": 0.5, "b": 1.0}
    close(run(model), both)
    model.unload_lora()
    assert torch.equal(run(model), plain)
    load(model, table, strength=0.5)
    model.fuse_lora()
    model.unload_lora()  # what is fused stays
    load(model, other, "b")
    close(run(model), both)
    assert adapters_of(model).strengths() == {"a": 0.5, "b": 1.0}


def test_adding_after_fusing_as_diffusers_does(model, table):
    """What is fused counts beside it as it did."""
    other = make_lora(model, 2, share=0.5)
    load(model, other, "b")
    load(model, table)
    before = weights_of(model_without(model))
    model.set_adapters("a")
    model.fuse_lora(lora_scale=0.5)
    model.set_adapters("b")
    expected = run(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]), "new")  # of zeros
    assert adapters_of(model).fused == set()
    assert adapters_of(model).strengths() == {"a": 0.5, "new": 1.0}
    close(run(model), expected)
    assert same(weights_of(model_without(model)), before)


def test_what_is_fused_at_no_strength(model, table):
    plain, other = run(model), make_lora(model, 2)
    load(model, table)
    model.fuse_lora(lora_scale=0.0)
    load(model, other, "b", strength=0.0)
    close(run(model), plain)


def test_one_of_two_that_are_fused_is_deleted(model, table):
    """It stays in the weights for good, the other one can be taken out."""
    by_file, deltas = differences(model)
    one, other = merged(model, table, 0.5, deltas), make_lora(model, 2)
    both, one = run(merged(merged(one, other, 0.5), {}, 0.5, deltas)), run(one)
    load(model, table, deltas=by_file)
    load(model, other, "b", deltas=by_file)
    model.fuse_lora(lora_scale=0.5)
    model.delete_adapters("a")
    close(run(model), both)
    adapters = adapters_of(model)
    assert (adapters.fused, adapters.in_weights) == ({"b"}, {"a", "b"})
    assert adapters.used() == {"a": ("", 0.5), "b": ("", 0.5)}
    model.disable_lora()
    close(run(model), one)
    kept = run(model)
    model.enable_lora()
    load(model, table, "c", strength=0.0)
    model.unload_lora()
    assert torch.equal(run(model), kept)
    assert adapters.used() == {"a": ("", 0.5)}


def test_an_active_one_that_is_not_fused_with_another(model, table, caplog):
    """It does not count in the layers of the other, whose matrices may be elsewhere than its differences."""
    by_file, deltas = differences(model)
    other = make_lora(model, 2, share=0.5)
    rest = {name: part for name, part in table.items() if name not in other}
    expected = run(merged(merged(model, other), rest, 0.7, deltas))
    load(model, table, strength=0.7, deltas=by_file)
    load(model, other, "b")
    with caplog.at_level(logging.WARNING, "wan22"):
        model.fuse_lora(adapter_names=["b"])
    assert "a does not count where another adapter is fused, until unfuse_lora" in caplog.text
    close(run(model), expected)
    found = adapters_of(model).strengths()["a"]
    module = "blocks.0.attn1.to_q"
    assert (found[module], found[f"{module}.differences"]) == (0.0, 0.7)
    adapters_of(model).unfuse_at_strengths("the strengths that are told can be set")
    close(run(model), expected)


def test_safe_fusing(model, table):
    before = weights_of(model)
    down, up, alpha = table["blocks.1.ffn.2"]
    load(model, {**table, "blocks.1.ffn.2": (down * 1e30, up * 1e30, alpha)})
    with pytest.raises(ValueError, match="NaNs detected"):
        model.fuse_lora(safe_fusing=True)
    assert adapters_of(model).fused == set()
    model.unload_lora()
    assert same(weights_of(model), before), "what was fused before is out again"


@pytest.mark.parametrize("narrow", ["int8", "cast"])
def test_narrow_weights(narrow, model, table):
    if narrow == "int8":
        quantize(model, "int8")
    else:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    before = run(model)
    load(model, table)
    unfused = run(model)
    with pytest.raises(
        ValueError, match=r"of the layers are .*, and fusing needs .*fuse_lora\(dequantize=True\)"
    ):
        model.fuse_lora()
    assert torch.equal(run(model), unfused)
    model.fuse_lora(dequantize=True)
    torch.testing.assert_close(run(model), unfused, rtol=1e-4, atol=1e-4)
    layer = model.blocks[0].attn1.to_q.get_base_layer()
    assert (type(layer), layer.weight.dtype) == (nn.Linear, torch.float32)
    model.unfuse_lora()
    assert torch.equal(run(model), unfused)
    model.unload_lora()
    assert torch.equal(run(model), before)
    layer = model.blocks[0].attn1.to_q
    assert isinstance(layer, QuantizedLinear) or layer.weight.dtype == torch.float8_e4m3fn


def test_differences_of_cast_layers_at_another_scale(model, table):
    by_file, _ = differences(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    load(model, table, strength=0.5, deltas=by_file)
    expected = run(model)
    model.set_adapters("a", 1.0)
    model.fuse_lora(lora_scale=0.5, dequantize=True)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


def test_fused_weights_stay_where_they_are(model, table):
    """So that a compiled model or an offload still has them."""
    pointers = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    by_file, _ = differences(model)
    load(model, table, deltas=by_file)
    for step in (lambda: model.fuse_lora(safe_fusing=True), model.unfuse_lora, model.unload_lora):
        step()
        now = {name.replace(".base_layer", ""): w.data_ptr() for name, w in model.named_parameters()}
        assert {name: now[name] for name in pointers} == pointers


def test_a_copy_has_its_own(model, table):
    load(model, table)
    model.fuse_lora()
    expected = run(model)
    copied = copy.deepcopy(model)
    copied.unfuse_lora()
    copied.unload_lora()
    close(run(model), expected)
    model.unfuse_lora()
    assert same(weights_of(model_without(model)), weights_of(copied))
