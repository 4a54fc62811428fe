"""What is saved with LoRAs loads everywhere: plain weights, and adapters at the strength that they have."""

import copy
import json

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.checkpoints.lora.models import FILE, close, differences, load, merged, run
from tests.checkpoints.lora_writers import make_lora
from wan22 import WanTransformer3DModel
from wan22.accel.quantize import quantize
from wan22.checkpoints.files.weights import read_weights
from wan22.checkpoints.lora.adapters import adapters_of
from wan22.checkpoints.lora.dialects import read_lora
from wan22.checkpoints.naming.keys import TRANSFORMER


def loaded(folder, **options):
    """A saved transformer as either library loads it."""
    ours = WanTransformer3DModel.from_pretrained(folder, **options)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, **options)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name])
    return ours.eval()


def state_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


# ---- weights ----


def test_a_fused_lora_is_saved(model, table, tmp_path):
    by_file, deltas = differences(model)
    expected = run(merged(model, table, 1.0, deltas))
    load(model, table, deltas=by_file)
    model.fuse_lora()
    model.save_pretrained(tmp_path)
    close(run(loaded(tmp_path)), expected)


def test_an_active_lora_is_refused_or_merged(model, table, tmp_path):
    by_file, deltas = differences(model)
    expected = run(merged(model, table, 0.5, deltas))
    load(model, table, strength=0.5, deltas=by_file)
    before, state = run(model), state_of(model)
    with pytest.raises(
        ValueError, match=r"the LoRA a is active, but not .*merge_lora=True.*disable_lora\(\)"
    ):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.save_pretrained(tmp_path, merge_lora=True)
    close(run(loaded(tmp_path)), expected)
    assert torch.equal(run(model), before)
    assert state_of(model).keys() == state.keys(), "the adapters are still there"
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert adapters_of(model).fused == set()


@pytest.mark.parametrize("switch", ["disable", "zero"])
def test_one_that_changes_nothing_is_left_out(switch, model, table, tmp_path):
    plain = run(model)
    load(model, table)
    if switch == "disable":
        model.disable_lora()
    else:
        model.set_adapters("a", 0.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(loaded(tmp_path)), plain)


def test_one_fused_and_one_active(model, table, tmp_path):
    other = {name: pair for name, pair in make_lora(model, 2).items() if name not in list(table)[:3]}
    table = {name: pair for name, pair in table.items() if name in list(table)[:3]}
    expected = run(merged(merged(model, table), other))
    load(model, table)
    load(model, other, "b")
    model.fuse_lora(adapter_names=["a"])
    model.save_pretrained(tmp_path, merge_lora=True)
    close(run(loaded(tmp_path)), expected)
    assert adapters_of(model).fused == {"a"}


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_quantised_weights(method, model, table, tmp_path):
    quantize(model, method)
    plain = run(model)
    load(model, table)
    with_it = run(model)
    model.save_pretrained(tmp_path / "merged", merge_lora=True)
    torch.testing.assert_close(run(loaded(tmp_path / "merged")), with_it, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model), with_it)
    model.disable_lora()
    model.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(run(loaded(tmp_path / "plain")), plain, rtol=1e-4, atol=1e-4)


def test_weights_of_torchao(model, tmp_path, table):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(model.blocks, torchao.Int8WeightOnlyConfig())
    expected = run(model)
    load(model, table)
    model.disable_lora()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded(tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_layerwise_casting(dtype, model, table, tmp_path):
    """They have the dtype that they compute in, which holds every value of float8."""
    model.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
    load(model, table)
    model.disable_lora()
    model.save_pretrained(tmp_path)
    stored = model.blocks[0].attn1.to_q.base_layer.weight
    weight = loaded(tmp_path).blocks[0].attn1.to_q.weight
    assert (stored.dtype, weight.dtype) == (torch.float8_e4m3fn, dtype)
    assert torch.equal(weight, stored.to(dtype))
    if dtype == torch.float32:
        close(run(loaded(tmp_path)), run(model))


# ---- adapters ----


CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"blocks.0.attn1.to_q": 2},
        "alpha_pattern": {"blocks.0.attn1.to_q": 5},
    },
}


@pytest.fixture(params=["file", *CONFIGS])
def adapted(request, model, table):
    if request.param == "file":
        load(model, table)
    else:
        config = CONFIGS[request.param] | {
            "target_modules": ["to_q", "ffn.net.2"],
            "init_lora_weights": False,
        }
        model.add_adapter(peft.LoraConfig(**config), "a")
    return model


@pytest.fixture
def bare(adapted):
    model = copy.deepcopy(adapted)
    model.unload_lora()
    return model


def test_diffusers_reads_it_back(adapted, bare, tmp_path):
    adapted.save_lora_adapter(tmp_path, "a")
    config = {name: value for name, value in bare.config.items() if not name.startswith("_")}
    theirs = diffusers.WanTransformer3DModel(**config).eval()
    theirs.load_state_dict(bare.state_dict())
    theirs.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="a", weight_name=FILE)
    close(run(theirs), run(adapted))
    bare.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="b", weight_name=FILE)
    close(run(bare), run(adapted))


def test_peft_reads_it_back(adapted, bare, tmp_path):
    adapted.save_lora_adapter(tmp_path, "a")
    with safe_open(tmp_path / FILE, "pt") as file:
        config = peft.LoraConfig(**json.loads(file.metadata()["lora_adapter_metadata"]))
    peft.inject_adapter_in_model(config, bare, "a")
    report = peft.set_peft_model_state_dict(bare, load_file(tmp_path / FILE), "a")
    assert not report.unexpected_keys
    close(run(bare), run(adapted))


@pytest.mark.parametrize("options", [{}, {"official_names": True}, {"safe_serialization": False}])
def test_it_is_read_back_here(options, adapted, bare, tmp_path):
    adapted.save_lora_adapter(tmp_path, "a", **options)
    (path,) = tmp_path.iterdir()
    if path.suffix == ".bin":
        state = torch.load(path, weights_only=True)
        diffusers.WanPipeline.save_lora_weights(tmp_path, {n: w.clone() for n, w in state.items()})
        path = tmp_path / FILE
    lora = read_lora(read_weights(path), adapters_of(bare).shapes)["transformer"]
    adapters_of(bare).load("b", lora, 1.0)
    close(run(bare), run(adapted))


def test_a_state_dict_alone_has_the_strength(model, table, tmp_path):
    """Scripts save it without the configuration, which is then lost."""
    load(model, table)
    state = peft.get_peft_model_state_dict(model, adapter_name="a")
    bare = copy.deepcopy(model)
    bare.unload_lora()
    diffusers.WanPipeline.save_lora_weights(tmp_path, state)
    bare.load_lora_adapter(str(tmp_path), adapter_name="b", weight_name=FILE)
    close(run(bare), run(model))


def test_comfyui_reads_the_official_names(adapted, bare, tmp_path):
    """It adds up @ down times alpha / rank, or times 1 without an alpha, to the weight of that name."""
    adapted.save_lora_adapter(tmp_path, "a", official_names=True)
    file = load_file(tmp_path / FILE)
    weights = {TRANSFORMER.inverse.rename(name): weight for name, weight in bare.state_dict().items()}
    used = set()
    for name, weight in weights.items():
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_B.weight" in file:
            up, down = file[f"{stem}.lora_B.weight"], file[f"{stem}.lora_A.weight"]
            scale = file[f"{stem}.alpha"].item() / len(down) if f"{stem}.alpha" in file else 1.0
            weight += scale * (up @ down)
            used |= {f"{stem}.lora_B.weight", f"{stem}.lora_A.weight", f"{stem}.alpha"}
    assert file.keys() <= used
    close(run(bare), run(adapted))


def test_whole_differences_and_other_kinds(model, table, tmp_path):
    by_file, deltas = differences(model)
    lengths = {
        f"diffusion_model.{name}.dora_scale": torch.rand(up.shape[0], 1) + 0.5
        for name, (_, up, _) in list(table.items())[:2]
    }
    load(model, table, deltas=by_file | lengths)
    with pytest.raises(
        ValueError, match=r"the adapter a has whole differences, .* official_names=True writes it"
    ):
        model.save_lora_adapter(tmp_path, "a")
    model.save_lora_adapter(tmp_path, "a", official_names=True)
    again = copy.deepcopy(model)
    again.unload_lora()
    lora = read_lora(read_weights(tmp_path / FILE), adapters_of(again).shapes)["transformer"]
    assert lora.deltas.keys() == deltas.keys()
    adapters_of(again).load("b", lora, 1.0)
    close(run(again), run(model))
    model.unload_lora()
    load(model, table, deltas=lengths)
    with pytest.raises(ValueError, match=r"is of several kinds \(DoRA, LoRA\)"):
        model.save_lora_adapter(tmp_path, "a")


def test_saving_leaves_the_model_as_it_is(model, table, tmp_path):
    """Parameters that are float32 among others stay so, and the others do not become it."""
    model.blocks.to(torch.bfloat16)
    load(model, table)
    dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
    model.save_lora_adapter(tmp_path, "a", upcast_before_saving=True)
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == dtypes
    assert {weight.dtype for weight in load_file(tmp_path / FILE).values()} == {torch.float32}


def test_what_is_not_there(model, tmp_path):
    with pytest.raises(ValueError, match=r"Adapter name default not found in the model\. There is none"):
        model.save_lora_adapter(tmp_path)
    assert list(tmp_path.iterdir()) == []
