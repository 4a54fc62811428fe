"""Quantised models: which layers, how far from the originals, in how much memory, and ordinary ones again."""

import copy
import weakref
from functools import partial

import accelerate
import diffusers
import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.builders import latents_of, random_components, random_pipeline, random_transformer
from tests.checkpoints.lora_writers import in_diffusers, make_lora, save
from wan22.accel import quantize as module
from wan22.accel.offload.layout import bytes_of
from wan22.accel.quantization import dynamic_float8
from wan22.accel.quantization.layers import linears_of
from wan22.accel.quantize import DynamicFloat8Linear, dequantize, quantize, report
from wan22.checkpoints.files import quantized as stored
from wan22.checkpoints.files.quantized import ScaledNumbers
from wan22.checkpoints.quantized_linear import QuantizedLinear
from wan22.progress import bytes_bar

METHODS = ["fp8", "fp8_dynamic", "int8"]
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def transformer(**config):
    return copy.deepcopy(random_transformer(0, **config))


def text_encoder():
    return copy.deepcopy(random_components()["text_encoder"])


def run(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 16, 2, 4, 4), (1, 5, 32)))
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text.to(dtype)).sample


def encode(model):
    with torch.no_grad():
        return model(torch.arange(3, 20)[None], torch.ones(1, 17, dtype=torch.long)).last_hidden_state


def error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def quantized_names(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def linear(o=48, i=64, dtype=torch.float32, std=0.05):
    torch.manual_seed(0)
    layer = nn.Linear(i, o)
    nn.init.normal_(layer.weight, std=std)
    return layer.to(dtype)


# ---- which layers ----


def test_the_large_layers_of_a_transformer_and_nothing_else():
    plain = transformer(image_dim=24, added_kv_proj_dim=48)
    model = quantize(copy.deepcopy(plain), "fp8")
    expected = {f"blocks.{b}.{a}.{p}" for b in (0, 1) for a in ("attn1", "attn2") for p in PROJECTIONS}
    expected |= {f"blocks.{b}.attn2.add_{p}_proj" for b in (0, 1) for p in "kv"}
    expected |= {f"blocks.{b}.ffn.net.{p}" for b in (0, 1) for p in ("0.proj", "2")}
    assert quantized_names(model) == expected
    before = plain.state_dict()
    kept = {name: w for name, w in model.named_parameters() if not name.endswith((".data", ".scale"))}
    assert kept.keys() == {name for name in before if name.removesuffix(".weight") not in expected}
    assert all(torch.equal(w, before[name]) for name, w in kept.items())


def test_all_linear_layers_of_the_text_encoder():
    plain = text_encoder()
    model = quantize(copy.deepcopy(plain), "fp8")
    assert quantized_names(model) == {n for n, m in plain.named_modules() if type(m) is nn.Linear}
    assert len(quantized_names(model)) == 2 * 7
    assert torch.equal(encode(model), encode(dequantize(copy.deepcopy(model))))
    assert 1e-3 < error(encode(model), encode(plain)) < 0.1
    # transformers asks for the dtype of this weight.
    half = model.to(torch.bfloat16)
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    assert encode(half).dtype == torch.bfloat16


# ---- values ----


@pytest.mark.parametrize(
    ("method", "block", "bound"),
    [("fp8", None, 2.8e-2), ("fp8", 128, 2.8e-2), ("int8", None, 9.5e-3), ("int8", 128, 7e-3)],
)
def test_errors_of_weights(method, block, bound):
    layer = linear(96, 5120)
    values = module._quantized(layer, method, block).values()
    assert 0.9 * bound < error(values, layer.weight) <= bound
    # One by one: half of the last place of 4 significant bits, or half a step of the scale.
    weight = layer.weight.detach().unflatten(1, (-1, block or 5120))
    scale = weight.abs().amax(2, keepdim=True) / (448 if method == "fp8" else 127)
    allowed = scale / 2 if method == "int8" else torch.maximum(weight.abs() / 16, scale * 2**-10)
    assert ((values.unflatten(1, (-1, block or 5120)) - weight).abs() <= 1.0001 * allowed).all()


def test_each_output_and_group_has_a_scale_of_its_own():
    layer = linear(32, 64)
    with torch.no_grad():
        layer.weight[5] *= 1e-4
        layer.weight[6] = 0
        layer.weight[7, :16] *= 1e4
    whole, grouped = (module._quantized(layer, "int8", block).values() for block in (None, 16))
    assert error(whole[5], layer.weight[5]) < 0.02
    for values in (whole, grouped, module._quantized(layer, "fp8", None).values()):
        assert torch.equal(values[6], torch.zeros(64))
    assert error(whole[7, 16:], layer.weight[7, 16:]) > 0.9
    assert error(grouped[7, 16:], layer.weight[7, 16:]) < 0.02


@pytest.mark.parametrize("method", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_computes_with_its_values(method, dtype):
    layer = module._quantized(linear(), method, 16)
    x = torch.randn(2, 5, 64, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.values().to(dtype), layer.bias.to(dtype)))


@pytest.mark.parametrize("kind", [FP8, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("groups", [None, 1, 4])
def test_the_way_without_float32_gives_the_same_bits(kind, groups, monkeypatch):
    """It is a GPU's; every byte is tried."""
    data = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    data = data[:, torch.isfinite(data.view(kind)[0].float())]
    data = data[:, : data.shape[1] // 4 * 4].contiguous()
    scale = torch.rand(()) if groups is None else torch.rand(64, groups, 1)
    form, parts = ScaledNumbers(kind, groups), {"data": data, "scale": scale}
    expected = [form.expand(parts).to(dtype) for dtype in DTYPES]
    monkeypatch.setattr(stored, "ROWS", 48)  # two parts of a CPU's
    assert all(torch.equal(form.expand(parts, d), e) for d, e in zip(DTYPES, expected, strict=True))
    monkeypatch.setattr(stored, "FLOAT32_FIRST", ())
    assert all(torch.equal(form.expand(parts, d), e) for d, e in zip(DTYPES, expected, strict=True))


class Largest(TorchDispatchMode):
    """Notes the most values that a float32 tensor had."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.values = max(self.values, out.numel())
        return out


@pytest.mark.parametrize("groups", [None, 1])
def test_a_weight_is_expanded_on_the_cpu_without_a_float32_copy_of_it(groups):
    """Plans of memory count the expanded weight alone."""
    data = torch.zeros(4 * stored.ROWS, 16, dtype=torch.uint8)
    scale = torch.rand(()) if groups is None else torch.rand(len(data), groups, 1)
    with Largest() as largest:
        ScaledNumbers(FP8, groups).expand({"data": data, "scale": scale}, torch.bfloat16)
    assert 0 < largest.values <= data.numel() // 4


# ---- models ----


@pytest.mark.parametrize(("method", "bound"), [("fp8", 2e-2), ("fp8_dynamic", 3e-2), ("int8", 4e-3)])
def test_the_output_stays_close(method, bound):
    plain = transformer()
    model = quantize(copy.deepcopy(plain), method)
    assert bound / 20 < error(run(model), run(plain)) <= bound


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_dequantized_it_is_an_ordinary_model_of_the_same_values(method):
    model = quantize(transformer(), method)
    expected, values = run(model), model.blocks[1].ffn.net[2].values()
    assert dequantize(model) is model
    assert not quantized_names(model)
    assert type(model.blocks[1].ffn.net[2]) is nn.Linear
    assert torch.equal(model.blocks[1].ffn.net[2].weight, values)
    assert torch.equal(run(model), expected)
    assert run(quantize(model, method)).isfinite().all(), "and it can be quantised again"


@pytest.mark.parametrize("method", METHODS)
def test_compiled_copied_and_cast(method):
    model = quantize(transformer(), method)
    expected = run(model)
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(run(compiled), expected, rtol=0, atol=1e-5)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied), expected)
    parts = {n: p.clone() for n, p in copied.named_parameters() if n.endswith((".data", ".scale"))}
    copied.to(torch.bfloat16)
    assert all(torch.equal(p, dict(copied.named_parameters())[name]) for name, p in parts.items())
    assert copied.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert error(run(copied, torch.bfloat16), expected) < 2e-2
    assert error(run(copied.to(torch.float32)), expected) < 2e-2
    assert torch.equal(run(model), expected)


def test_a_compiled_model_is_quantised_inside():
    torch._dynamo.reset()
    model = torch.compile(transformer(), fullgraph=True, backend="eager")
    run(model)
    assert quantize(model, "fp8") is model
    assert error(run(model), run(dequantize(copy.deepcopy(model._orig_mod)))) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_saved_it_is_an_ordinary_model(method, tmp_path):
    model = quantize(transformer(), method)
    model.save_pretrained(tmp_path)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    ours = dequantize(model).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(w, theirs[name]) for name, w in ours.items())


def test_memory():
    """Of layers of a real shape in bf16: half, and at no time more than one layer above the model."""
    model = random_transformer(0).to(torch.bfloat16)
    model.blocks = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(2))
    for block in model.blocks:
        block.ffn.net[0].proj, block.ffn.net[2] = linear(1024, 256, torch.bfloat16), linear(256, 1024)
        block.ffn.net[2].to(torch.bfloat16)
    largest, before = 2 * 1024 * 256, bytes_of(model)
    layers = dict(linears_of(model))
    weights = sum(layer.weight.nbytes for layer in layers.values())
    del layers
    with pytest.MonkeyPatch.context() as patch, Peak(model) as peak:
        patch.setattr(module, "ROWS", 32)
        quantize(model, "fp8")
    assert before + largest / 4 < peak.bytes <= before + 1.25 * largest
    parts = sum(p.nbytes for n, p in model.named_parameters() if n.endswith((".data", ".scale")))
    assert parts <= 0.52 * weights
    assert bytes_of(model) == before - weights + parts


class Peak(TorchDispatchMode):
    """Adds up the memory of a model and of all that operations return, for as long as it is there."""

    def __init__(self, model):
        super().__init__()
        self.bytes, self.there = 0, {}
        self.count(model.parameters())

    def count(self, tensors):
        for tensor in (x for x in tensors if not x.is_meta):
            storage = tensor.untyped_storage()
            self.there[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.there = {key: entry for key, entry in self.there.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.there.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.count(x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


# ---- float8 by float8 ----


def float8_product(x, layer):
    """The formula, in float64: a scale per token and one per output, both operands rounded."""
    x, weight = x.double(), layer.weight.double()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    weight_scale = weight.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).float().to(FP8).double() * scale
    return rounded @ ((weight / weight_scale).float().to(FP8).double() * weight_scale).T + layer.bias


@pytest.mark.parametrize("form", ["by rows", "afterwards"])
@pytest.mark.parametrize(
    # In the half dtypes the factors are rounded, too, so that some numbers round to their other neighbour.
    ("dtype", "bound"),
    [(torch.float32, 5e-3), (torch.bfloat16, 3e-2), (torch.float16, 3e-2)],
)
def test_float8_by_float8(form, dtype, bound, monkeypatch):
    plain = linear(48, 256)
    layer = module._quantized(plain, "fp8_dynamic", None)
    assert type(layer) is DynamicFloat8Linear
    assert dynamic_float8._product_form(torch.device("cpu")) == "by rows"
    x = (torch.randn(2, 35, 256) * torch.logspace(-3, 3, 35)[:, None]).to(dtype)
    x[0, 0] = 0
    monkeypatch.setattr(dynamic_float8, "_product_form", lambda device: form)
    out, expected = layer(x), float8_product(x, plain)
    assert out.dtype == dtype
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    rows = list(zip(*(y.flatten(0, 1) for y in (out, expected, exact)), strict=True))
    assert max(error(found, formula) for found, formula, _ in rows) <= bound
    ours, formulas = (sum(error(row[i], row[2]) for row in rows) for i in (0, 1))
    assert ours <= 1.05 * formulas, "no less exact"
    assert 1e-2 < error(out, F.linear(x.float(), layer.values(), layer.bias)) < 5e-2


def test_queries_keys_and_values_share_one_input_in_float8(monkeypatch):
    q, k = (module._quantized(linear(48, 256).bfloat16(), "fp8_dynamic", None) for _ in range(2))
    made, inner = [], dynamic_float8._per_token_float8
    monkeypatch.setattr(dynamic_float8, "_per_token_float8", lambda x: made.append(len(x)) or inner(x))
    x = torch.randn(1, 35, 256).bfloat16()
    expected = q(x.clone()), k(x.clone())
    made.clear()
    assert torch.equal(q(x), expected[0])
    assert torch.equal(k(x), expected[1])
    assert len(made) == 1
    x.mul_(2)
    assert torch.equal(q(x), q(x.clone())), "written to since"
    kept = weakref.ref(dynamic_float8._shared.rows_of(x)[0])
    assert kept() is not None
    del x
    assert kept() is None, "gone with the input"


def test_a_bias_within_the_product_is_rounded_once():
    layer = module._quantized(linear(48, 256), "fp8_dynamic", None)
    x = torch.randn(7, 256).bfloat16()
    layer.bias.data.fill_(100)
    exact = layer(x.float())  # whose bias is added in float32
    assert error(layer(x), exact) <= 2**-8


def test_where_float8_is_not_multiplied():
    plain = linear(48, 256)
    layer, weights_only = (module._quantized(plain, method, None) for method in ("fp8_dynamic", "fp8"))
    x = torch.randn(7, 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_float8, "_PRODUCTS", {"by rows": lambda *tensors: torch.zeros(16, 16)})
        dynamic_float8._tried_form.cache_clear()
        assert dynamic_float8._product_form(torch.device("cpu")) is None, "wrong numbers are found out"
        assert torch.equal(layer(x), weights_only(x))
    dynamic_float8._tried_form.cache_clear()
    assert not torch.equal(layer(x), weights_only(x))
    assert layer.to("meta")(x.to("meta")).shape == (7, 48)


def test_gradients_flow_through_the_weights_alone():
    plain = linear(48, 256)
    x = torch.randn(7, 256, requires_grad=True)
    layer, weights_only = (module._quantized(plain, method, None) for method in ("fp8_dynamic", "fp8"))
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(weights_only(x).square().sum(), x)
    assert torch.equal(found, expected)


# ---- LoRAs and offloading ----


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_loras_on_quantised_transformers(method, tmp_path):
    pipe = copy.deepcopy(random_pipeline())
    table = make_lora(pipe.transformer, 0)
    path = save(table, tmp_path / "w.safetensors")
    for slot in ("transformer", "transformer_2"):
        quantize(getattr(pipe, slot), method)
    expected = copy.deepcopy(pipe)
    plain = latents_of(pipe)
    pipe.load_lora_weights(path)
    for slot in ("transformer", "transformer_2"):
        model = dequantize(getattr(expected, slot))
        for name, (down, up, alpha) in table.items():
            with torch.no_grad():
                model.get_submodule(in_diffusers(name)).weight += alpha / down.shape[0] * (up @ down)
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-4, atol=1e-4)
    assert error(latents_of(pipe), plain) > 0.02
    with pytest.raises(ValueError, match=r"has LoRAs.*call unload_lora_weights\(\) first"):
        quantize(pipe.transformer, method)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


def test_after_loras_were_unloaded(tmp_path):
    pipe = copy.deepcopy(random_pipeline())
    path = save(make_lora(pipe.transformer, 0), tmp_path / "w.safetensors")
    for change in (lambda: quantize(pipe.transformer, "int8"), lambda: dequantize(pipe.transformer)):
        pipe.load_lora_weights(path)
        adapted = latents_of(pipe)
        pipe.unload_lora_weights()
        change()
        pipe.load_lora_weights(path)
        assert error(latents_of(pipe), adapted) < 2e-2
        pipe.unload_lora_weights()


def test_in_groups_offloaded():
    pipe = copy.deepcopy(random_pipeline())
    models, cpu = [pipe.transformer, pipe.transformer_2], torch.device("cpu")
    for model in models:
        quantize(model, "fp8")
    expected = latents_of(pipe)
    for model in models:
        dequantize(model)
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        quantize(model, "fp8")
    assert models[0].blocks[0].attn1.to_q._diffusers_hook.get_hook("group_offloading") is not None
    assert error(latents_of(pipe), expected) < 2e-2  # rounded twice


# ---- report ----


def test_the_report(capsys):
    plain = transformer()
    model = quantize(copy.deepcopy(plain), "fp8")
    found = report(plain, model, size=(2, 4, 6), tokens=7)
    assert found.layers.keys() == quantized_names(model)
    name = "blocks.1.attn2.to_k"
    weight = plain.get_submodule(name).weight
    assert found.layers[name] == pytest.approx(error(model.get_submodule(name).values(), weight))
    assert all(1e-2 < e < 3e-2 for e in found.layers.values())
    assert 1e-3 < found.block < found.output < 2e-2
    assert (found.bytes_before, found.bytes_after) == (bytes_of(plain), bytes_of(model))
    told = capsys.readouterr().out
    assert f"{found.output:.1e}" in told
    assert max(found.layers, key=found.layers.get) in told


def test_the_report_of_given_inputs_and_of_other_models():
    plain = transformer()
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 16, 2, 4, 4), (1, 5, 32)))
    inputs = {"hidden_states": x, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
    model = quantize(copy.deepcopy(plain), "int8")
    assert report(plain, model, inputs).output == pytest.approx(error(run(model), run(plain)), rel=1e-3)
    with pytest.raises(ValueError, match="no layer of the second WanTransformer3DModel is quantised"):
        report(model, plain)
    for image in ({}, {"pos_embed_seq_len": 10}):
        plain = transformer(image_dim=24, added_kv_proj_dim=48, **image)
        assert 0 < report(plain, quantize(copy.deepcopy(plain), "int8")).output < 1e-2
    plain = text_encoder()
    assert 0 < report(plain, quantize(copy.deepcopy(plain), "int8")).output < 2e-2


# ---- refusals ----


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fp4", {}, "method 'fp4' must be fp8, fp8_dynamic, int8 or a configuration of torchao"),
        ("int8", {"block": 20}, r"block=20 does not divide the 48 inputs of blocks\.0\.attn1\.to_q"),
        ("int8", {"block": 0}, "block=0 must be an int, at least 1"),
        ("fp8_dynamic", {"block": 16}, "one scale for all inputs"),
        (object(), {"block": 16}, "torchao's configurations have their own"),
    ],
)
def test_methods_that_do_not_fit(method, options, message):
    model = transformer()
    with pytest.raises(ValueError, match=message):
        quantize(model, method, **options)
    assert not quantized_names(model)


def test_models_that_cannot_be_quantised():
    odd = transformer()
    odd.blocks[1].ffn.net[2] = nn.Linear(64, 40)
    with pytest.raises(ValueError, match=r"ffn\.net\.2 has 64 inputs and 40 outputs; .* multiples of 16"):
        quantize(odd, "fp8_dynamic")
    assert not quantized_names(odd)
    with pytest.raises(
        ValueError, match=r"is quantised already \(int8\); load it again .* or call dequantize first"
    ):
        quantize(quantize(transformer(), "int8"), "fp8")
    with pytest.raises(ValueError, match="no layer of this WanTransformer3DModel is quantised"):
        dequantize(transformer())
    with pytest.raises(ValueError, match="AutoencoderKLWan is neither a Wan transformer nor umT5"):
        quantize(random_components()["vae"], "fp8")
    with pytest.raises(ValueError, match=r"to_q\.weight is not there .*enable_sequential_cpu_offload"):
        quantize(accelerate.cpu_offload(transformer(), torch.device("cpu")), "fp8")
    cast = transformer()
    cast.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"is stored in torch\.float8_e4m3fn; it must be one of torch\.fl"):
        quantize(cast, "fp8")
    adapted = transformer()
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has LoRAs"):
        quantize(adapted, "fp8")


# ---- torchao ----


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="object is taken for torchao's configuration: pip install torchao"):
        quantize(transformer(), object())


def test_configurations_of_torchao():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    plain = transformer().to(torch.bfloat16)
    model = quantize(copy.deepcopy(plain), torchao.Int8WeightOnlyConfig())
    ours = quantize(copy.deepcopy(plain), "int8")
    found = report(plain, model)
    assert found.layers.keys() == quantized_names(ours)
    assert 0 < found.output < 1e-2
    assert found.bytes_after == pytest.approx(bytes_of(ours), rel=0.05)
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "fp8")
    expected = run(model, torch.bfloat16)
    dequantize(model)
    assert type(model.blocks[0].attn1.to_q.weight) is nn.Parameter
    assert type(model.blocks[0].attn1.to_q.weight.data) is torch.Tensor
    assert error(run(model, torch.bfloat16), expected) < 1e-2


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("groups", [None, 1, 4])
def test_a_gpu_expands_to_the_same_bits(groups):
    data = torch.randint(0, 120, (64, 256), dtype=torch.uint8)
    scale = torch.rand(()) if groups is None else torch.rand(64, groups, 1)
    form, parts = ScaledNumbers(FP8, groups), {"data": data, "scale": scale}
    on_gpu = {name: part.cuda() for name, part in parts.items()}
    assert all(torch.equal(form.expand(on_gpu, d).cpu(), form.expand(parts, d)) for d in DTYPES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_computes_the_same(method):
    model = quantize(transformer(), method)
    layer, x = model.blocks[0].ffn.net[0].proj, torch.randn(32, 48)
    found = copy.deepcopy(layer).cuda()(x.cuda()).cpu()
    assert error(found, layer(x)) <= (1e-2 if method == "fp8_dynamic" else 1e-5)
    if method == "fp8_dynamic" and torch.cuda.get_device_capability() >= (8, 9):
        assert dynamic_float8._product_form(torch.device("cuda", 0)) is not None
    expected = run(model)
    assert torch.equal(run(model.cuda().cpu()), expected)


def test_quantising_shows_its_bytes(monkeypatch, bars_are_wanted, capsys):
    module = "wan22.pipelines.attached.acceleration.bytes_bar"
    monkeypatch.setattr(module, partial(bytes_bar, delay=0, disable=False))
    pipe = random_pipeline(transformer=random_transformer(1), transformer_2=None, boundary_ratio=None)
    del pipe._progress_bar_config
    pipe.quantize("int8")
    told = capsys.readouterr().err
    layers = [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]
    total = sum(m.in_features * m.out_features for m in layers) * 4
    assert "quantizing: 100%" in told and f"{total / 1e3:.0f}k/{total / 1e3:.0f}k" in told and "B/s" in told
    quiet = random_pipeline(transformer=random_transformer(1), transformer_2=None, boundary_ratio=None)
    monkeypatch.setattr(module, partial(bytes_bar, delay=0))
    quiet.quantize("int8")
    assert capsys.readouterr().err == ""
