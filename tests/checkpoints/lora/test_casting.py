"""LoRAs on layers that are stored in float8 and compute in more: diffusers' layerwise casting."""

import copy

import peft
import pytest
import torch

from tests.checkpoints.lora.models import FILE, close, differences, load, merged, run
from tests.checkpoints.lora_writers import make_lora
from wan22.checkpoints.lora.adapters import adapters_of

FLOAT8 = torch.float8_e4m3fn


def cast(model):
    model.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)


def rounded(model):
    """The model with the weights that a cast one computes with."""
    model = copy.deepcopy(model)
    cast(twin := copy.deepcopy(model))
    model.load_state_dict({name: weight.float() for name, weight in twin.state_dict().items()})
    return model


@pytest.mark.parametrize("first", ["cast", "load"])
def test_either_order(first, model, table):
    by_file, deltas = differences(model)
    del by_file["diffusion_model.blocks.0.self_attn.q.diff_b"], deltas["blocks.0.attn1.to_q.bias"]
    expected = run(merged(rounded(model), table, 0.7, deltas))
    plain = run(rounded(model))
    steps = [lambda: cast(model), lambda: load(model, table, strength=0.7, deltas=by_file)]
    for step in steps if first == "cast" else steps[::-1]:
        step()
    close(run(model), expected)
    close(run(model), expected), "a second time, after a cast back"
    assert model.blocks[0].attn1.to_q.base_layer.weight.dtype == FLOAT8
    model.unload_lora()
    close(run(model), plain)


def test_a_difference_of_a_cast_bias_is_not_rounded(model, table):
    cast(model)
    base, delta = model.blocks[0].attn1.to_q.bias.float(), torch.full((48,), 1e-4)
    load(model, {}, deltas={"diffusion_model.blocks.0.self_attn.q.diff_b": delta})
    run(model)
    assert torch.equal(model.blocks[0].attn1.to_q.bias, base + delta)


def test_fused_before_it_is_cast(model, table):
    """The sum is rounded, as a merged checkpoint would be."""
    expected = run(rounded(merged(model, table)))
    load(model, table)
    model.fuse_lora()
    cast(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_diffusers_methods(dora, model, tmp_path):
    source = copy.deepcopy(model)
    source.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False, use_dora=dora)
    )
    source.save_lora_adapter(tmp_path)
    cast(model)
    config = peft.LoraConfig(r=4, target_modules=["to_k"], init_lora_weights=False, use_dora=dora)
    model.add_adapter(config, "added")
    assert model.blocks[0].attn1.to_k.lora_A["added"].weight.dtype == torch.float32
    if not dora:  # whose loading is PEFT's own
        model.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="read", weight_name=FILE)
        read, wanted = (m.blocks[0].attn1.to_q for m in (model, source))
        assert torch.equal(read.lora_A["read"].weight, wanted.lora_A["default"].weight)
    assert torch.isfinite(run(model)).all()
    assert model.blocks[0].attn1.to_v.weight.dtype == FLOAT8


def test_a_dora_after_the_cast(model):
    table = make_lora(model, 1)
    tensors = {
        f"diffusion_model.{name}.dora_scale": torch.ones(up.shape[0], 1) for name, (_, up, _) in table.items()
    }
    load(reference := rounded(model), table, deltas=tensors)
    cast(model)
    load(model, table, deltas=tensors)
    assert next(iter(adapters_of(model).strengths().values())) == 1.0
    close(run(model), run(reference))
