"""LoRAs in both experts: every dialect computes what the merged weights compute, and goes without a trace."""

import copy
import logging

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from tests.builders import latents_of, random_pipeline
from tests.checkpoints import writers
from tests.checkpoints.lora_writers import DIALECTS, in_diffusers, linears, make_lora, save
from wan22 import FlowMatchEulerScheduler, WanT2VPipeline, WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.lora import sources
from wan22.checkpoints.naming.keys import TRANSFORMER
from wan22.checkpoints.quantized_linear import QuantizedLinear

SLOTS = ("transformer", "transformer_2")
LORA = "pretrained_model_name_or_path_or_dict"


def merge(model, table, strength=1.0, deltas=()):
    """Add a LoRA to a model's weights."""
    with torch.no_grad():
        for module, (down, up, alpha) in table.items():
            layer = model.get_submodule(in_diffusers(module))
            layer.weight += strength * alpha / down.shape[0] * (up @ down)
        for name, delta in dict(deltas).items():
            model.get_parameter(name).add_(strength * delta)


@pytest.fixture
def pipe():
    return copy.deepcopy(random_pipeline())


@pytest.fixture(scope="module")
def tables():
    pipe = random_pipeline()
    return {slot: make_lora(getattr(pipe, slot), i) for i, slot in enumerate(SLOTS)}


@pytest.fixture(scope="module")
def plain():
    return latents_of(random_pipeline())


def merged(strengths, tables, deltas=()):
    """The latents of merged weights."""
    pipe = copy.deepcopy(random_pipeline())
    for slot, strength in zip(SLOTS, strengths, strict=True):
        merge(getattr(pipe, slot), tables[slot], strength, deltas)
    return latents_of(pipe)


@pytest.fixture(scope="module")
def both(tables):
    return merged((1, 1), tables)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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


# ---- other adapters ----


def factors(o, n):
    """Split sizes as LyCORIS does: the first factor the smaller."""
    return [(4, o // 4), (4, n // 4)]


def lokr(o, n, form):
    """Return a LoKr's tensors and the weight that they stand for, before alpha."""
    (o1, o2), (n1, n2) = factors(o, n)
    parts = {"lokr_w1": torch.randn(o1, n1) * 0.2}
    if "a" in form:
        parts = {"lokr_w1_a": torch.randn(o1, 2) * 0.4, "lokr_w1_b": torch.randn(2, n1) * 0.4}
    if "b" in form:
        parts |= {"lokr_w2_a": torch.randn(o2, 2) * 0.4, "lokr_w2_b": torch.randn(2, n2) * 0.4}
    else:
        parts["lokr_w2"] = torch.randn(o2, n2) * 0.2
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return parts, torch.kron(first, second), 2 if form else None


def loha(o, n, form):
    parts = {
        f"hada_w{i}_{side}": torch.randn(*shape) * 0.5
        for i in (1, 2)
        for side, shape in (("a", (o, 3)), ("b", (3, n)))
    }
    a, b, c, d = (parts[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    return parts, (a @ b) * (c @ d), 3


@pytest.mark.parametrize(("make", "form"), [(lokr, ""), (lokr, "a"), (lokr, "b"), (lokr, "ab"), (loha, "")])
def test_lokr_and_loha(make, form, pipe, plain, tmp_path):
    torch.manual_seed(1)
    file, deltas = {}, {}
    for module, (o, n) in linears(pipe.transformer).items():
        parts, delta, rank = make(o, n, form)
        alpha = 1.5
        for name, tensor in (parts | {"alpha": torch.tensor(alpha)}).items():
            file[f"lycoris_{module.replace('.', '_')}.{name}"] = tensor
        # A LoKr of two whole factors has no rank, and its alpha does not count.
        deltas[f"{in_diffusers(module)}.weight"] = delta * (alpha / rank if rank else 1)
    save_file(file, tmp_path / "w.safetensors")
    pipe.load_lora_weights(tmp_path / "w.safetensors", strength=0.5)
    nothing = {slot: {} for slot in SLOTS}
    expected = merged((0.5, 0.5), nothing, deltas)
    assert (expected - plain).norm() > 0.02 * plain.norm()
    close(latents_of(pipe), expected)
    pipe.fuse_lora()
    close(latents_of(pipe), expected)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora(key, pipe, tables, plain, tmp_path):
    """The weight's rows get the lengths that the file holds."""
    file = DIALECTS["diffusion_model, alpha"](tables["transformer"])
    expected = copy.deepcopy(random_pipeline())
    generator = torch.Generator().manual_seed(2)
    for module, (down, up, alpha) in tables["transformer"].items():
        lengths = torch.rand(up.shape[0], generator=generator) + 0.5
        file[f"diffusion_model.{module}.{key}"] = lengths[:, None] if key == "dora_scale" else lengths
        for slot in SLOTS:
            weight = getattr(expected, slot).get_submodule(in_diffusers(module)).weight.data
            moved = weight + alpha / down.shape[0] * (up @ down)
            weight.copy_(moved / moved.norm(dim=1, keepdim=True) * lengths[:, None])
    save_file(file, tmp_path / "w.safetensors")
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    close(latents_of(pipe), latents_of(expected))
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


def test_adapters_of_several_kinds_together(pipe, tables, plain, tmp_path):
    """PEFT's layers then stand around one another."""
    torch.manual_seed(1)
    file, deltas = {}, {}
    for module, (o, n) in linears(pipe.transformer).items():
        parts, delta, _ = lokr(o, n, "")
        file |= {f"lycoris_{module.replace('.', '_')}.{name}": tensor for name, tensor in parts.items()}
        deltas[f"{in_diffusers(module)}.weight"] = delta
    save_file(file, tmp_path / "lokr.safetensors")
    both = dict.fromkeys(SLOTS, tables["transformer"])
    path = save(tables["transformer"], tmp_path / "w.safetensors")
    for name, source in (("a", path), ("b", tmp_path / "lokr.safetensors"), ("c", path)):
        pipe.load_lora_weights(source, name)
    pipe.set_adapters(["a", "b"])
    expected = merged((1, 1), both, deltas)
    close(latents_of(pipe), expected)
    pipe.set_adapters("c")
    close(latents_of(pipe), merged((1, 1), both))
    pipe.set_adapters(["b", "c"])
    before = latents_of(pipe)
    pipe.fuse_lora()
    close(latents_of(pipe), expected)
    pipe.unfuse_lora()
    assert torch.equal(latents_of(pipe), before)
    pipe.delete_adapters("b")
    close(latents_of(pipe), merged((1, 1), both))
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)
    assert type(pipe.transformer.blocks[0].attn1.to_q) is torch.nn.Linear


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


def test_a_strength_does_not_recompile(pipe, tables, tmp_path):
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"))
    model = pipe.transformer
    ids = {name: id(p) for name, p in model.named_parameters()}
    pipe.set_adapters("default_0", 0.5)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    config = model.config
    x = torch.randn(1, config.in_channels, 2, 4, 4)
    arguments = (x, torch.tensor([500.0]), torch.randn(1, 3, config.text_dim))
    with torch.no_grad():
        results = []
        for strength in (0.5, 0.8, 0.2):
            pipe.set_adapters("default_0", strength)
            results.append(compiled(*arguments, return_dict=False)[0])
            torch.testing.assert_close(results[-1], model(*arguments, return_dict=False)[0])
    assert not torch.equal(results[0], results[1])
    assert counter.frame_count <= 2, "one more, when the number becomes a variable"

    pipe.transformer = compiled  # as users do; adapters are then found inside of it
    pipe.set_adapters("default_0", 0.8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments, return_dict=False)[0], results[1])
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert pipe.get_list_adapters() == {slot: ["default_0"] for slot in SLOTS}


def test_weights_that_are_offloaded(pipe, tables, both, plain, tmp_path):
    high, low = (save(tables[slot], tmp_path / f"{slot}.safetensors") for slot in SLOTS)
    cpu = torch.device("cpu")
    for slot in SLOTS:
        apply_group_offloading(
            getattr(pipe, slot), onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
        )
    pipe.load_lora_weights(high=high, low=low)
    matrix = pipe.transformer.blocks[0].attn1.to_q.lora_A["default_0"]
    assert matrix._diffusers_hook.get_hook("group_offloading") is not None
    close(latents_of(pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)

    one_by_one = copy.deepcopy(random_pipeline())
    accelerate.cpu_offload(one_by_one.transformer, execution_device=cpu)
    with pytest.raises(ValueError, match="load LoRAs before enable_sequential_cpu_offload"):
        one_by_one.load_lora_weights(high=high)
    assert not hasattr(one_by_one.transformer.blocks[0].attn1.to_q, "lora_A")


# ---- quantised bases ----


def test_on_scaled_float8(tmp_path, tables):
    config = dict(random_pipeline().transformer.config)
    sizes = {k: v for k, v in config.items() if not k.startswith("_")}
    official = {
        TRANSFORMER.inverse.rename(name): w for name, w in random_pipeline().transformer.state_dict().items()
    }
    values = writers.grouped(official, tmp_path / "base.safetensors")
    base = WanTransformer3DModel.from_single_file(
        tmp_path / "base.safetensors", dtype=torch.float32, attention_head_dim=config["attention_head_dim"]
    )
    plain = WanTransformer3DModel(**sizes).eval()
    plain.load_state_dict({TRANSFORMER.rename(name): w for name, w in values.items()})
    pipe, expected = (random_pipeline() for _ in range(2))
    pipe, expected = copy.deepcopy(pipe), copy.deepcopy(expected)
    pipe.transformer, expected.transformer = base, plain
    high = save(tables["transformer"], tmp_path / "w.safetensors")
    quantised = latents_of(pipe)
    pipe.load_lora_weights(high=high)
    merge(expected.transformer, tables["transformer"])
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="layers are quantised, and fusing needs their weights expanded"):
        pipe.fuse_lora()
    pipe.fuse_lora(dequantize=True)
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, QuantizedLinear)
    assert torch.equal(latents_of(pipe), quantised)


def test_a_whole_difference_of_a_quantised_weight_is_refused(pipe):
    """It would go into the copy that is expanded at each call, and be lost."""
    before = pipe.transformer.blocks[0].attn1.to_q.weight
    pipe.quantize("int8")
    delta = {"diffusion_model.blocks.0.self_attn.q.diff": torch.ones_like(before)}
    with pytest.raises(
        ValueError, match=r"differences of blocks\.0\.attn1\.to_q\.weight, which are quantised"
    ):
        pipe.load_lora_weights(delta)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(len(before))})


def test_on_torchao(pipe, tables, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"))
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    for slot in SLOTS:
        torchao.quantize_(getattr(pipe, slot).blocks, torchao.Int8WeightOnlyConfig())
    quantised = latents_of(pipe)
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert (latents_of(pipe) - expected).norm() < 0.3 * (quantised - expected).norm()
    with pytest.raises(ValueError, match=r"layers are quantised .*leave the LoRA unfused"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), quantised)


# ---- what does not fit ----


def test_no_key_fits(pipe, tmp_path):
    save_file({"unet.down.0.lora_down.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"no key fits transformer; there are unet\.down\.0\.lora"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert pipe.get_list_adapters() == {}


def test_some_keys_do_not_fit(pipe, tables, caplog, tmp_path):
    """Such as a LoRA of image to video on text to video: layers of other sizes are left out, and named."""
    file = DIALECTS["diffusion_model, alpha"](tables["transformer"])
    file["diffusion_model.patch_embedding.lora_down.weight"] = torch.ones(2, 36, 1, 2, 2)
    out = len(pipe.transformer.patch_embedding.bias)
    file["diffusion_model.patch_embedding.lora_up.weight"] = torch.ones(out, 2)
    file["diffusion_model.blocks.77.self_attn.q.lora_down.weight"] = torch.ones(2, 4)
    save_file(file, tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING, "wan22"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert "blocks.77.self_attn.q.lora_down.weight, patch_embedding fit nothing in transformer" in caplog.text
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer"])))


def test_half_a_pair(pipe, tmp_path):
    save_file({"blocks.0.ffn.0.lora_down.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"of blocks\.0\.ffn\.net\.0\.proj not all matrices"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lokr_t2", "LoKr of a convolution"),
        ("hada_t1", "LoHa of a convolution"),
        ("lora_mid.weight", "LoCon"),
        ("oft_blocks", "OFT"),
    ],
)
def test_other_adapters_are_named(key, kind, pipe, tmp_path):
    save_file({f"lycoris_blocks_0_ffn_0.{key}": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"is a {kind}"):
        pipe.load_lora_weights(tmp_path / "w.safetensors")


def test_names_that_look_swapped(pipe, tables, caplog, tmp_path):
    low, high = (
        save(tables[s], tmp_path / f"{n}_noise_model.safetensors")
        for s, n in zip(SLOTS, ("low", "high"), strict=True)
    )
    with caplog.at_level(logging.WARNING, "wan22"):
        pipe.load_lora_weights(high=low, low=high)
    assert "high=low_noise_model.safetensors and low=high_noise_model.safetensors look swapped" in caplog.text


def test_arguments(pipe, tables, tmp_path):
    path = save(tables["transformer"], tmp_path / "w.safetensors")
    for arguments in ({}, {LORA: path, "high": path}):
        with pytest.raises(ValueError, match="give one LoRA, or high= and low="):
            pipe.load_lora_weights(**arguments)
    with pytest.raises(ValueError, match=r"must be one number, or two: \(high, low\)"):
        pipe.load_lora_weights(path, strength=(1, 2, 3))
    for strength in (float("nan"), (1, float("inf")), {"transformer": float("nan")}):
        with pytest.raises(ValueError, match=r"strength=(nan|inf) must be a finite number"):
            pipe.load_lora_weights(path, strength=strength)
    with pytest.raises(ValueError, match="a strength is given for 'high'"):
        pipe.load_lora_weights(path, strength={"high": 1})
    with pytest.raises(ValueError, match=r"takes no cache$"):
        pipe.load_lora_weights(path, cache=1)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(path, "a")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        pipe.load_lora_weights(path, "a")
    with pytest.raises(ValueError, match="'b' is not in the list of present adapters: a"):
        pipe.set_adapters("b")
    with pytest.raises(ValueError, match="2 strengths for 1 adapters"):
        pipe.set_adapters(["a"], [1, 2])
    pipe = copy.deepcopy(random_pipeline(experts=1))
    with pytest.raises(ValueError, match="a LoRA for transformer_2, which is not loaded"):
        pipe.load_lora_weights(low=path)


# ---- folders and repositories ----


def test_a_folder(pipe, tables, both, tmp_path):
    """With Lightning's two files it is a pair; with one file it is that; with others one must be named."""
    for slot, name in zip(SLOTS, ("high_noise_model", "low_noise_model"), strict=True):
        save(tables[slot], tmp_path / f"{name}.safetensors")
    pipe.load_lora_weights(tmp_path)
    close(latents_of(pipe), both)
    pipe.unload_lora_weights()
    (tmp_path / "low_noise_model.safetensors").unlink()
    pipe.load_lora_weights(tmp_path)
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer"])))
    pipe.unload_lora_weights()
    save(tables["transformer_2"], tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds high_noise_model\..*, other\..*; give"):
        pipe.load_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="other.safetensors")
    close(latents_of(pipe), merged((1, 1), dict.fromkeys(SLOTS, tables["transformer_2"])))


def test_a_repository(pipe, tables, both, tmp_path, monkeypatch):
    folder = tmp_path / "Seko-V1"
    folder.mkdir()
    for slot, name in zip(SLOTS, ("high_noise_model", "low_noise_model"), strict=True):
        save(tables[slot], folder / f"{name}.safetensors")
    names = ["README.md", *(f"Seko-V1/{n}_noise_model.safetensors" for n in ("high", "low"))]
    monkeypatch.setattr(sources, "list_repo_files", lambda repo, **hub: names)

    def download(repo, name, subfolder, **hub):
        assert (repo, hub) == ("org/lightning", {"revision": "v1"})
        return str(tmp_path / subfolder / name)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    pipe.load_lora_weights("org/lightning", subfolder="Seko-V1", revision="v1")
    close(latents_of(pipe), both)


def test_peft_is_underneath(pipe, tables, tmp_path):
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"))
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, peft.tuners.lora.Linear)


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
