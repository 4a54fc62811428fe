"""A transformer's adapters are what PEFT's layers hold, whoever changed them last."""

import copy
import logging

import diffusers
import peft
import pytest
import torch

from tests.checkpoints.lora.models import FILE, close, differences, load, merged, model_without, run, swap
from tests.checkpoints.lora_writers import make_lora
from wan22.checkpoints.lora.adapters import adapters_of
from wan22.checkpoints.lora.names import from_peft, to_peft


def of_diffusers(model):
    """The same weights in diffusers' own class."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    theirs = diffusers.WanTransformer3DModel(**config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("own_class", [True, False])
def test_what_is_set_on_the_model_last_counts(own_class, model, table):
    plain, by_file, deltas = run(model), *differences(model)
    expected = {s: run(merged(model, table, s, deltas)) for s in (1.0, 0.3)}
    bare = copy.deepcopy(model)
    model = model if own_class else of_diffusers(model)
    adapters = adapters_of(model)
    load(model, table, deltas=by_file)
    assert adapters.strengths() == {"a": 1.0}
    close(run(model), expected[1.0])
    model.set_adapters("a", 0.3)
    assert adapters.strengths() == {"a": 0.3}
    close(run(model), expected[0.3])
    model.disable_lora()
    assert (adapters.strengths(), adapters.active) == ({}, ["a"])
    close(run(model), plain)
    model.enable_lora()
    close(run(model), expected[0.3])
    model.set_adapters(["a"], [1.0])
    close(run(model), expected[1.0])
    model.delete_adapters("a")
    assert (adapters.strengths(), adapters.names) == ({}, [])
    close(run(model), plain)
    load(model, table, "b", deltas=by_file)
    model.unload_lora()
    assert adapters.names == []
    assert all(torch.equal(w, bare.state_dict()[name]) for name, w in model.state_dict().items())


def test_adapters_that_diffusers_adds(model, table, tmp_path):
    load(model, table)
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(config, "mine")
    adapters = adapters_of(model)
    assert adapters.names == ["a", "mine"]
    assert adapters.strengths() == {"mine": 1.0}, "as in diffusers, the one that is added is active alone"
    model.set_adapters(["a", "mine"], [0.8, 0.25])
    assert adapters.strengths() == {"a": 0.8, "mine": 0.25}
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(0.5)
    assert adapters.strengths() == {"a": 0.4, "mine": 0.125}
    model.set_adapters(["a", "mine"])
    wanted = run(model)
    model.save_lora_adapter(tmp_path, "mine")
    model.delete_adapters("mine")
    model.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="again", weight_name=FILE)
    assert adapters.names == ["a", "again"]
    model.set_adapters(["a", "again"])
    close(run(model), wanted)


def test_one_that_is_loaded_displaces_those_that_diffusers_added(model, table, caplog):
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    with caplog.at_level(logging.WARNING, "wan22"):
        load(model, table)
    assert adapters_of(model).active == ["a"]
    assert "default is not active beside a; set_adapters" in caplog.text
    load(model, table, "b")
    assert adapters_of(model).active == ["a", "b"]


def test_strengths_by_module(model, table):
    load(model, table)
    for weights in ({"blocks.0": 0.1}, {"blocks.0.attn1": 0.5, "ffn": 0.0}):
        factor = lambda name, weights=weights: next((w for k, w in weights.items() if k in name), 1.0)  # noqa: E731
        model.set_adapters("a", weights)
        close(run(model), run(merged(model_without(model), table, scale_of=factor)))
        found = adapters_of(model).strengths()["a"]
        assert found["blocks.0.attn1.to_q"] == factor("blocks.0.attn1.to_q")
        assert found["blocks.1.attn1.to_q"] == 1.0
        adapters_of(model).set({"a": found})
        assert adapters_of(model).strengths() == {"a": found}, "what a recipe holds gives the same again"


def test_a_block_is_not_another_whose_number_begins_alike(caplog):
    from wan22.checkpoints.lora.adapters import _lookup

    assert _lookup({"blocks.1": 0.5}, "blocks.1.attn1.to_q") == ("blocks.1", 0.5)
    assert _lookup({"blocks.1": 0.5}, "blocks.10.attn1.to_q") == (None, 1.0)
    assert _lookup({"attn": 0.5}, "blocks.10.attn1.to_q") == ("attn", 0.5)
    assert _lookup({"blocks.1": 0.5, "blocks.1.ffn": 0.2}, "blocks.1.ffn") == ("blocks.1.ffn", 0.2)


def test_one_that_changes_nothing_is_told(model, table, caplog):
    plain = run(model)
    with caplog.at_level(logging.WARNING, "wan22"):
        load(model, table)
        assert "changes nothing" not in caplog.text
        adapters_of(model).unload()
        load(model, {key: (a, torch.zeros_like(b), *rest) for key, (a, b, *rest) in table.items()})
    assert "the LoRA a changes nothing: its matrices' products are all zero" in caplog.text
    close(run(model), plain)


def test_names_of_modules_that_are_not_there(model, table, caplog):
    load(model, table)
    with caplog.at_level(logging.WARNING, "wan22"):
        model.set_adapters("a", {"blocks.7": 0.5})
    assert "strengths of blocks.7: the adapter a has no such modules" in caplog.text
    with pytest.raises(ValueError, match="must be a finite number"):
        model.set_adapters("a", float("nan"))


@pytest.mark.parametrize(
    "name", ["wan2.2-lightning-v1.1", "train", "a-b", "keys", "50%", "日本", "lora_a", " "]
)
def test_any_name(name, model, table):
    assert from_peft(to_peft(name)) == name
    assert to_peft(to_peft(name)) == to_peft(name), "diffusers' methods may call one another"
    plain = run(model)
    load(model, table, name)
    assert (adapters_of(model).names, model.active_adapters()) == ([name], [name])
    model.set_adapters(name, 0.5)
    model.set_adapter(name)
    assert adapters_of(model).strengths() == {name: 0.5}
    model.delete_adapters(name)
    assert torch.equal(run(model), plain)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]), name)
    assert adapters_of(model).names == [name]


def test_no_name():
    with pytest.raises(ValueError, match="name must not be empty"):
        to_peft("")


@pytest.mark.parametrize("hotswap", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_scale_for_one_call(scale, hotswap, model, table):
    by_file, deltas = differences(model)
    expected = run(merged(model, table, 0.7 * scale, deltas))
    if hotswap:
        model.enable_lora_hotswap(target_rank=8)
    load(model, table, strength=0.7, deltas=by_file)
    before = run(model)
    scalings = [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "scaling")]
    close(run(model, attention_kwargs={"scale": scale}), expected)
    assert [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "scaling")] == scalings
    assert torch.equal(run(model), before)


def test_deleting_the_active_one_activates_another(model, table, caplog):
    """As PEFT does, but not silently."""
    load(model, table)
    load(model, make_lora(model_without(model), 2), "b")
    model.set_adapters("b")
    with caplog.at_level(logging.WARNING, "wan22"):
        model.delete_adapters("b")
    assert adapters_of(model).strengths() == {"a": 1.0}
    assert "a is active now" in caplog.text


def test_deleting_the_active_one_activates_another_in_all_its_layers(model, table):
    first = dict(list(table.items())[: len(table) // 2])
    expected = run(merged(model, table, 0.5))
    load(model, table, strength=0.5)
    load(model, first, "b")
    model.set_adapters("b")
    model.delete_adapters("b")
    assert adapters_of(model).strengths() == {"a": 0.5}
    close(run(model), expected)


def test_one_that_diffusers_adds_while_adapters_are_disabled(model, table):
    plain = run(model)
    load(model, dict(list(table.items())[:3]))
    model.disable_lora()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_v"], init_lora_weights=False), "new")
    assert adapters_of(model).strengths() == {}
    close(run(model), plain)
    model.enable_lora()
    assert adapters_of(model).strengths() == {"new": 1.0}


def test_the_file_of_one_that_diffusers_replaces_is_forgotten(model, table):
    model = of_diffusers(model)
    load(model, table)
    assert adapters_of(model).used() == {"a": ("", 1.0)}
    model.delete_adapters("a")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_v"]), "a")
    assert adapters_of(model).used() == {"a": (None, 1.0)}
    assert adapters_of(model).foreign("a")


@pytest.mark.parametrize("options", [{"lora_alpha": 16}, {"use_rslora": True}, {"lora_bias": True}])
def test_hotswapping_one_that_diffusers_added(options, model, table):
    """With its matrices goes all that it was made with."""
    lora = {name: part for name, part in table.items() if name.endswith("_attn.v")}
    expected = run(merged(model, lora, 0.5))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_v"], **options), "a")
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and layer.lora_B["a"].bias is not None:
            layer.lora_B["a"].bias.data.fill_(0.5)
    swap(model, lora, strength=0.5)
    assert adapters_of(model).strengths() == {"a": 0.5}
    close(run(model), expected)


def test_hotswapping_a_dora_is_refused(model, table):
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_v"], use_dora=True), "a")
    with pytest.raises(ValueError, match="takes plain LoRAs, not DoRA"):
        swap(model, {name: part for name, part in table.items() if name.endswith("_attn.v")})


def test_moving_to_a_device(model, table):
    load(model, table)
    load(model, make_lora(model_without(model), 2), "b")
    adapters_of(model).move(["b"], "meta")
    parameters = dict(model.named_parameters())
    assert all(p.is_meta == (".b." in name) for name, p in parameters.items())
