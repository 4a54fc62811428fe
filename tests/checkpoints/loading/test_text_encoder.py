"""umT5 from files: the official .pth, transformers' names, ComfyUI's scaled float8, GGUF."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import golden_text_encoder
from tests.checkpoints import writers
from tests.golden_data import golden
from tests.official_t5_keys import t5_state_dict
from wan22.checkpoints.loading.recognize import read_model
from wan22.checkpoints.quantized_linear import QuantizedLinear

# Names of the llama.cpp converter, beside the official ones.
GGUF_NAMES = {
    "token_embedding": "token_embd",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "attn.": "attn_",
    "pos_embedding.embedding": "attn_rel_b",
    "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
    "blocks.": "enc.blk.",
}


def gguf_name(name):
    if name == "norm.weight":
        return "enc.output_norm.weight"
    for official, theirs in GGUF_NAMES.items():
        name = name.replace(official, theirs)
    return name


def load(path, *options):
    return read_model(path, "text_encoder").load(*options)


@pytest.fixture(scope="module")
def official():
    return golden("t5").weights


def tokens(model):
    io = golden("t5").io
    with torch.no_grad():
        return model(io["case0.ids"], attention_mask=io["case0.mask"]).last_hidden_state


def check(model, tolerance=0.0):
    torch.testing.assert_close(tokens(model), tokens(golden_text_encoder()), rtol=tolerance, atol=tolerance)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert not model.training


def test_the_official_file(official, tmp_path):
    torch.save(official, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    model = load(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", torch.float32)
    check(model)
    expected, found = golden_text_encoder().config.to_dict(), model.config.to_dict()
    for name in (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_layers",
        "relative_attention_num_buckets",
    ):
        assert found[name] == expected[name]


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", None])
def test_transformers_names(official, kept, tmp_path):
    """The embedding under either of its names or both, beside the decoder, which is not needed."""
    file = {name: w.clone() for name, w in t5_state_dict(official).items()}
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if kept and name != kept:
            del file[name]
    save_file(
        file | {"decoder.x": torch.ones(1), "lm_head.weight": torch.ones(1)}, tmp_path / "w.safetensors"
    )
    check(load(tmp_path / "w.safetensors", torch.float32))


def test_comfyui_scaled(official, tmp_path):
    """With the tokenizer's model inside, as bytes."""
    file = {name: w.clone() for name, w in t5_state_dict(official).items() if "embed_tokens" not in name}
    values = dict(file)
    for name, w in values.items():
        if w.ndim == 2 and (".SelfAttention." in name or ".DenseReluDense." in name) and "bias" not in name:
            scale = writers.one_scale(w)
            file[name] = writers.rounded(w, scale)
            file[name.replace(".weight", ".scale_weight")] = scale
            values[name] = file[name].float() * scale
    file |= {
        "scaled_fp8": torch.empty(0, dtype=writers.FP8),
        "spiece_model": torch.ones(9, dtype=torch.uint8),
    }
    save_file(file, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    expected = golden_text_encoder()
    plain = type(expected)(expected.config).eval()
    plain.load_state_dict(values | {"encoder.embed_tokens.weight": values["shared.weight"]})
    for dequantize in (False, True):
        model = load(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", torch.float32, dequantize)
        assert any(isinstance(m, QuantizedLinear) for m in model.modules()) != dequantize
        torch.testing.assert_close(tokens(model), tokens(plain), rtol=1e-5, atol=1e-5)


def test_a_quantised_embedding(official, tmp_path):
    """Expanded into bfloat16, where no other dtype is asked for; no embedding is a linear layer."""
    file = {name: w.clone() for name, w in official.items()}
    file["token_embedding.weight"] = (file["token_embedding.weight"] / 8).to(writers.FP8)
    save_file(file, tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors").shared.weight.dtype == torch.bfloat16
    model = load(tmp_path / "w.safetensors", torch.float32)
    assert torch.equal(model.shared.weight, file["token_embedding.weight"].float())


def test_gguf(official, tmp_path):
    names = {gguf_name(name): w for name, w in official.items()}
    writers.write_gguf(names, tmp_path / "w.gguf", "F16", "t5encoder")
    check(load(tmp_path / "w.gguf", torch.float32), 1e-5)


def test_a_half_precision_file(official, tmp_path):
    save_file({name: w.bfloat16() for name, w in official.items()}, tmp_path / "w.safetensors")
    model = load(tmp_path / "w.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_embedding.weight": None}, r"no umT5: it has no shared\.weight"),
        ({"token_embedding.weight": 0}, r"shared\.weight is all zero"),
        ({"blocks.0.attn.q.weight": None}, "has no encoder.block.0.layer.0.SelfAttention.q"),
        ({"blocks.1.pos_embedding.embedding.weight": None}, "lacks .*block.1.*relative_attention_bias"),
        ({"blocks.1.more.weight": 1}, r"holds blocks\.1\.more\.weight, which umT5 has no place for"),
    ],
)
def test_what_cannot_be_accounted_for_is_named(official, changes, message, tmp_path):
    file = dict(official)
    for name, value in changes.items():
        old = file.pop(name, torch.ones(3, 3))
        if value is not None:
            file[name] = old * value
    save_file(file, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "w.safetensors")


def test_two_embeddings_that_differ(official, tmp_path):
    file = {name: w.clone() for name, w in t5_state_dict(official).items()}
    file["encoder.embed_tokens.weight"] += 1
    save_file(file, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"shared\.weight and encoder\.embed_tokens\.weight differ"):
        load(tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite(value, tmp_path):
    weights = {name: w.clone() for name, w in golden("t5").weights.items()}
    weights["token_embedding.weight"][3, 4] = value
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"shared\.weight has values that are not finite"):
        read_model(tmp_path / "w.pth", "text_encoder").load()
