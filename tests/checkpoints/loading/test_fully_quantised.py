"""Files in which any tensor may be quantised: biases, norms, modulation and embeddings, too."""

import pytest
import torch

from tests.checkpoints import writers
from tests.checkpoints.loading.test_models import official, plain, run  # noqa: F401
from tests.checkpoints.loading.test_recognize import check
from tests.checkpoints.loading.test_text_encoder import gguf_name
from tests.golden_data import golden
from wan22 import AutoencoderKLWan, WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.files.quantized import scaled_tensor
from wan22.checkpoints.loading.recognize import read_model
from wan22.checkpoints.quantized_linear import QuantizedLinear


def only_biases(weights, path):
    biases = {name: w for name, w in weights.items() if name.endswith(".bias")}
    values = writers.every_fp8(biases, path)
    writers.save_file(weights | {name: w.to(writers.FP8) for name, w in values.items()}, path)
    return weights | values


EVERY = {
    "e4m3fn": writers.every_fp8,
    "e5m2": lambda w, path: writers.every_fp8(w, path, torch.float8_e5m2),
    "scaled": lambda w, path: writers.every_fp8(w, path, scaled=True),
    "biases": only_biases,
    **{
        kind: lambda w, path, kind=kind: writers.write_gguf(w, path, kind, every=True)
        for kind in ("Q8_0", "Q4_0", "BF16")
    },
}


@pytest.mark.parametrize("form", EVERY)
def test_the_values_are_those_of_the_file(official, form, tmp_path):  # noqa: F811
    values = EVERY[form](official, tmp_path / "w")
    expected = plain(values)
    expanded = WanTransformer3DModel.from_single_file(tmp_path / "w", dtype=torch.float32, dequantize=True)
    found = expanded.state_dict()
    for name, w in expected.state_dict().items():
        torch.testing.assert_close(found[name], w, rtol=1e-6, atol=1e-8)
    kept = WanTransformer3DModel.from_single_file(tmp_path / "w", dtype=torch.float32)
    assert isinstance(kept.blocks[0].attn1.to_q, QuantizedLinear) is (form not in ("biases", "BF16"))
    torch.testing.assert_close(run(kept), run(expected), rtol=1e-5, atol=1e-5)
    check(tmp_path / "w", "transformer")


def test_as_stored_what_is_float32_inside_stays_exact(official, tmp_path):  # noqa: F811
    values = writers.every_fp8(official, tmp_path / "w", scaled=True)
    model = WanTransformer3DModel.from_single_file(tmp_path / "w")
    assert torch.equal(model.blocks[0].scale_shift_table, values["blocks.0.modulation"])
    assert torch.equal(model.patch_embedding.weight, values["patch_embedding.weight"])
    assert model.blocks[0].attn1.to_q.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 2, 1, 3)])
def test_a_scale_for_each_output_of_any_rank(shape):
    data, scale = torch.randn(shape).to(writers.FP8), torch.rand(6)
    expected = data.float() * scale.reshape(-1, *[1] * (len(shape) - 1))
    for given in (scale, scale.reshape(-1, *[1] * (len(shape) - 1))):
        tensor = scaled_tensor(data, given)
        assert torch.equal(tensor.format.expand(tensor.parts), expected)


def test_an_autoencoder(tmp_path):
    values = writers.every_fp8({n: w.clone() for n, w in golden("vae21").weights.items()}, tmp_path / "w")
    torch.save(values, tmp_path / "plain.pth")
    loaded, expected = (
        AutoencoderKLWan.from_single_file(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("w", "plain.pth")
    )
    assert all(torch.equal(loaded[name], w) for name, w in expected.items())


@pytest.mark.parametrize("form", ["float8", "Q8_0"])
def test_a_text_encoder(form, tmp_path):
    weights = {name: w.clone() for name, w in golden("t5").weights.items()}
    if form == "Q8_0":
        values = writers.write_gguf(
            {gguf_name(n): w for n, w in weights.items()}, tmp_path / "w", "Q8_0", "t5encoder", every=True
        )
    else:
        values = writers.every_fp8(weights, tmp_path / "w")
    torch.save(values, tmp_path / "plain.pth")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        found, expected = (
            read_model(tmp_path / name, "text_encoder").load(torch.float32)(ids).last_hidden_state
            for name in ("w", "plain.pth")
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_is_saved_after_layerwise_casting_loads_again(tmp_path):
    """Stored in float8, computed in bfloat16: from the folder of the model and from its file."""
    arguments = {"subfolder": "transformer", "dtype": torch.bfloat16}
    model = WanTransformer3DModel.from_pretrained(tiny_checkpoint(), **arguments)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x, torch.tensor([500.0]), text).sample
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    for again in (
        WanTransformer3DModel.from_pretrained(tmp_path),
        WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        WanTransformer3DModel.from_single_file(file, attention_head_dim=64),
    ):
        with torch.no_grad():
            found = again(x, torch.tensor([500.0]), text).sample
        assert torch.equal(found, expected)
