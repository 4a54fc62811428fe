"""Models from files: every format gives the weights that its writer meant, or one clear error."""

import copy
import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import golden_transformer, golden_vae
from tests.checkpoints import writers
from tests.golden_data import golden
from tests.official_keys import transformer_state_dict
from wan22 import AutoencoderKLWan, WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.quantized_linear import QuantizedLinear

HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}


@pytest.fixture(scope="module")
def official():
    """A transformer's official weights: one block of two heads, wide enough for GGUF's blocks."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**HEADS, ffn_dim=512, num_layers=2, text_dim=64, freq_dim=32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return {official_name(name): w.detach() for name, w in model.state_dict().items()}


def official_name(name):
    """The official name of one of our parameters, written out by hand."""
    for ours, theirs in (
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        ("to_out.0", "o"),
        ("to_", ""),
        ("norm2", "norm3"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ):
        name = name.replace(ours, theirs)
    if name == "scale_shift_table":
        return "head.modulation"
    return name.replace("scale_shift_table", "modulation")


def run(model, dtype=torch.float32):
    torch.manual_seed(1)
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 64, dtype=dtype)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text).sample


def plain(values):
    """The model with these official weights, in float32."""
    model = WanTransformer3DModel(**HEADS, ffn_dim=512, num_layers=2, text_dim=64, freq_dim=32).eval()
    model.load_state_dict(transformer_state_dict(values))
    return model


# ---- ordinary weights ----


@pytest.mark.parametrize("name", ["dit_t2v_hd128", "dit_i2v_hd32", "dit_ti2v_hd24"])
def test_official_transformer_weights(name, tmp_path):
    config = golden(name).info["config"]
    heads = {"attention_head_dim": config["dim"] // config["num_heads"]}
    path = shutil.copy(f"tests/golden/{name}.weights.safetensors", tmp_path / "any_name.bin")
    model = WanTransformer3DModel.from_single_file(path, dtype=torch.float32, **heads)
    assert_same(model, golden_transformer(name))
    assert_same_config(model, golden_transformer(name))


@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_official_autoencoder_weights(name, tmp_path):
    torch.save(golden(name).weights, tmp_path / "Wan_VAE.pth")
    for path in (tmp_path / "Wan_VAE.pth", tmp_path):
        model = AutoencoderKLWan.from_pretrained(path)
        assert_same(model, golden_vae(name))
        assert_same_config(model, golden_vae(name))


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_our_own_names(component):
    cls = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}[component]
    (file,) = (tiny_checkpoint() / component).glob("*.safetensors")
    expected = cls.from_pretrained(tiny_checkpoint(), subfolder=component, dtype=torch.float32)
    known = (
        {"attention_head_dim": 64}
        if component == "transformer"
        else {name: expected.config[name] for name in ("latents_mean", "latents_std")}
    )
    model = cls.from_single_file(file, dtype=torch.float32, **known)
    assert_same(model, expected)
    assert_same_config(model, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes_and_dtypes(official, prefix, dtype, tmp_path):
    save_file({prefix + name: w.to(dtype) for name, w in official.items()}, tmp_path / "w.safetensors")
    model = WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors")
    assert_same(model, plain({name: w.to(dtype) for name, w in official.items()}), exact_dtype=False)
    assert model.blocks[0].attn1.to_q.weight.dtype == dtype
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert not model.training


def test_compiled_names(official, tmp_path):
    compiled = {name.replace("blocks.0.", "blocks.0._orig_mod."): w for name, w in official.items()}
    save_file(compiled, tmp_path / "w.safetensors")
    assert_same(WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors"), plain(official))
    name = "blocks.0.modulation"
    save_file(compiled | {name: official[name].clone()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.0\.modulation twice"):
        WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("wrapped", [False, True])
def test_pth(official, wrapped, tmp_path):
    torch.save({"state_dict": official} if wrapped else official, tmp_path / "w.pth")
    assert_same(WanTransformer3DModel.from_single_file(tmp_path / "w.pth"), plain(official))


def test_the_official_folder(official, tmp_path):
    """Shards with an index, and a config.json in the official words."""
    folder = tmp_path / "high_noise_model"
    folder.mkdir()
    names = sorted(official)
    places = {
        name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)
    }
    for file in set(places.values()):
        save_file({n: official[n] for n in names if places[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 256, "num_heads": 4, "eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    model = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="high_noise_model")
    assert (model.config.num_attention_heads, model.config.attention_head_dim, model.config.eps) == (
        4,
        64,
        1e-5,
    )
    assert {name: w for name, w in model.state_dict().items()}.keys() == plain(official).state_dict().keys()
    (folder / places[names[0]]).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 2 shards; missing: {places[names[0]]}"):
        WanTransformer3DModel.from_pretrained(tmp_path, subfolder="high_noise_model")


def test_plain_diffusers_reads_what_is_saved(official, tmp_path):
    save_file(official, tmp_path / "w.safetensors")
    WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors").save_pretrained(tmp_path / "saved")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert theirs.state_dict().keys() == plain(official).state_dict().keys()
    assert_same(theirs, plain(official))


# ---- quantised weights ----

FORMS = {
    "comfy, old": lambda w, path: writers.comfy_old(w, path, "model.diffusion_model."),
    "comfy, old, full matmul": lambda w, path: writers.comfy_old(w, path, full_matmul=True),
    "comfy, notes": lambda w, path: writers.comfy_new(w, path, prefix="diffusion_model."),
    "comfy, header": lambda w, path: writers.comfy_new(w, path, notes="header"),
    "musubi, per output": lambda w, path: writers.grouped(w, path),
    "musubi, per group": lambda w, path: writers.grouped(w, path, groups=4),
    "lightx2v": lambda w, path: writers.grouped(w, path, suffix="weight_scale"),
    "plain": writers.plain_fp8,
    **{
        kind: lambda w, path, kind=kind: writers.write_gguf(w, path, kind)
        for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_files(official, form, tmp_path):
    values = FORMS[form](official, tmp_path / "weights")
    expected = run(plain(values))
    expanded = WanTransformer3DModel.from_single_file(
        tmp_path / "weights", dtype=torch.float32, dequantize=True
    )
    assert not any(isinstance(m, QuantizedLinear) for m in expanded.modules())
    torch.testing.assert_close(run(expanded), expected, rtol=1e-5, atol=1e-5)

    model = WanTransformer3DModel.from_single_file(tmp_path / "weights", dtype=torch.float32)
    quantized = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == (0 if form in ("F16", "BF16") else 2 * 10)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if quantized:
        assert stored <= 1.05 * (tmp_path / "weights").stat().st_size

    parts = {n: p for n, p in model.named_parameters() if n.endswith((".data", ".scale"))}
    before = {name: t.clone() for name, t in parts.items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(t, before[name]) for name, t in parts.items()), "a cast must not round scales"
    error = (run(model, torch.bfloat16) - expected).norm() / expected.norm()
    assert error < 0.02


def test_the_dtype_of_a_layer_is_the_one_asked_for(official, tmp_path):
    """Also where its bias is stored in float32; casts of the model count."""
    writers.write_gguf(official, tmp_path / "w.gguf", "Q8_0")
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        layer = WanTransformer3DModel.from_single_file(tmp_path / "w.gguf", dtype=dtype).blocks[0].attn1.to_q
        assert layer.weight.dtype == layer.expand().weight.dtype == layer.expand().bias.dtype == expected
        assert layer.to(torch.float32).weight.dtype == torch.float32
        x = torch.randn(2, 256)
        torch.testing.assert_close(layer(x), layer.expand()(x))


def test_saved_it_is_an_ordinary_model(official, tmp_path):
    values = writers.grouped(official, tmp_path / "w", groups=4)
    model = WanTransformer3DModel.from_single_file(tmp_path / "w", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert_same(theirs, plain(values))


def test_the_dtype_of_what_was_quantised(official, tmp_path):
    writers.comfy_old(official, tmp_path / "w")
    model = WanTransformer3DModel.from_single_file(tmp_path / "w", dequantize=True)
    assert model.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16


# ---- refusals ----


def changed(official, path, **changes):
    """Write a scaled file with some of its tensors replaced, or left out where None."""
    writers.comfy_new(official, path)
    file = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        file.pop(name, None)
        if tensor is not None:
            file[name] = tensor
    save_file(file, path)


NOTE = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__modulation": None}, "lacks scale_shift_table"),
        ({"blocks__1__more": torch.ones(3)}, r"holds blocks\.1\.more, which this model has no place for"),
        ({"head__modulation": torch.ones(1, 3, 256)}, r"scale_shift_table of another shape.*\(1, 3, 256\)"),
        (
            {"blocks__0__ffn__0__weight_scale": None},
            r"blocks\.0\.ffn\.0\.weight is scaled .*its scale is missing",
        ),
        (
            {"blocks__9__ffn__0__weight_scale": torch.ones(())},
            r"no weight for blocks\.9\.ffn\.0\.weight_scale",
        ),
        (
            {"blocks__0__ffn__0__weight_scale": torch.ones(7)},
            r"blocks\.0\.ffn\.0\.weight: the scale has shape \(7,\)",
        ),
        ({"blocks__0__ffn__0__weight_scale_2": torch.ones(())}, "quantised as nvfp4 .*weight_scale_2"),
        ({"blocks__0__ffn__0__weight__absmax": torch.ones(9)}, "quantised as bitsandbytes"),
        ({"blocks__0__ffn__0__qweight": torch.ones(9)}, "quantised as GPTQ or AWQ"),
        ({"blocks__0__ffn__0__comfy_quant": NOTE}, r"blocks\.0\.ffn\.0 is quantised as mxfp8"),
        (
            {"blocks__0__ffn__0__weight": torch.ones(512, 256)},
            "said to be float8_e4m3fn, but is torch.float32",
        ),
        ({"blocks__0__ffn__0__weight": torch.ones(512, 256, dtype=torch.int8)}, "int8"),
        ({"blocks__0__ffn__0__weight_scale": torch.tensor(float("nan"))}, "its scale is zero, or not finite"),
        ({"blocks__0__ffn__0__weight_scale": torch.zeros(())}, "its scale is zero, or not finite"),
        (
            {"blocks__0__ffn__0__comfy_quant": torch.ones(3)},
            "comfy_quant is no text: 1 axes of torch.float32",
        ),
        ({"blocks__0__ffn__0__comfy_quant": NOTE[:5]}, "comfy_quant is not JSON"),
        (
            {"head__head__weight": torch.ones(64)},
            r"head\.head\.weight has shape \(64,\), it must have 2 axes",
        ),
        (
            {"text_embedding__0__weight": torch.ones(256, 0)},
            r"shape \(256, 0\), it must have 2 axes, none empty",
        ),
        ({"time_embedding__0__weight": torch.ones(256, 31)}, "has 31 inputs, an odd number"),
        ({"patch_embedding__weight": torch.ones(256, 16, 0, 2, 2)}, "it must have no empty axis"),
        ({"blocks__0__norm3__scale_weight": torch.ones(())}, "norm3.weight is not float8, but has a scale"),
        ({"vace_blocks__0__after_proj__weight": torch.ones(1)}, "VACE, which is not supported"),
        ({"audio_injector__x": torch.ones(1)}, "S2V, which is not supported"),
        ({"pose_patch_embedding__weight": torch.ones(1)}, "Animate, which is not supported"),
        ({"control_adapter__conv__weight": torch.ones(1)}, "camera control, which is not supported"),
    ],
)
def test_what_cannot_be_accounted_for_is_named(official, changes, message, tmp_path):
    changed(official, tmp_path / "w.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors")


def test_many_names_are_counted(official, tmp_path):
    save_file(official | {f"extra.{i}": torch.ones(1) for i in range(9)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"extra\.0, extra\.1, extra\.2 and 6 more"):
        WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "pth"])
@pytest.mark.parametrize("name", ["{}", "blocks.{}.comfy_quant", "{}.qweight", "{}.scale_weight"])
def test_names_in_errors_are_escaped(official, name, save, tmp_path):
    """A terminal finds nothing to obey in what a stranger has called a tensor."""
    save(official | {name.format("a\x1b[31m\x9b\r"): torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"a\\x1b\[31m\\x9b\\r") as error:
        WanTransformer3DModel.from_single_file(tmp_path / "weights")
    assert str(error.value).isprintable()


def test_another_models_file(tmp_path):
    with pytest.raises(ValueError, match=r"no place for|no Wan model"):
        WanTransformer3DModel.from_single_file("tests/golden/vae21.weights.safetensors")
    with pytest.raises(ValueError, match=r"no place for|no Wan model"):
        AutoencoderKLWan.from_single_file("tests/golden/dit_t2v_hd32.weights.safetensors")


def assert_same(model, expected, exact_dtype=True):
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, w in expected.state_dict().items():
        assert torch.equal(weights[name].float(), w.float()), name
        assert weights[name].dtype == w.dtype or not exact_dtype


def assert_same_config(model, expected):
    def values(config):
        return {
            k: list(v) if isinstance(v, list | tuple) else v
            for k, v in config.items()
            if not k.startswith("_")
        }

    found, wanted = values(model.config), values(expected.config)
    for name in ("latents_mean", "latents_std"):
        torch.testing.assert_close(torch.tensor(found.pop(name, 0)), torch.tensor(wanted.pop(name, 0)))
    assert found == wanted


@pytest.mark.parametrize("name", ["encode", "decode", "encode_stream", "decode_stream"])
def test_an_offloaded_autoencoder_comes_to_its_device(name):
    """accelerate's hook is called by whatever is called of it, not by `forward` alone."""
    vae, came = copy.deepcopy(golden_vae("vae21")), []
    vae._hf_hook = SimpleNamespace(pre_forward=came.append)
    given = {"encode": torch.zeros(1, 3, 1, 16, 16), "encode_stream": []}
    z = torch.zeros(1, vae.config.z_dim, 1, 2, 2)
    with torch.no_grad():
        getattr(vae, name)(given.get(name, z))
    assert came == [vae]
