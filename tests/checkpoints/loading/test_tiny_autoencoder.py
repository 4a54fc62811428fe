"""Loading a tiny decoder: both file formats, sizes from the tensors, nothing missing, nothing left over."""

import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_tiny_autoencoder import WIDTHS, latents, tiny_decoder
from wan22.checkpoints.loading.tiny_autoencoder import load_tiny_decoder

ENCODER = {"encoder.0.weight": torch.zeros(4, 12, 3, 3), "encoder.22.bias": torch.zeros(5)}


def tensors(**options):
    return {name: tensor.clone() for name, tensor in tiny_decoder(**options).state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("options", [{}, {"patch_size": 1}, {"frame_factors": (2, 2, 1)}], ids=str)
def test_both_formats(tmp_path, ending, options):
    """With or without the encoder, sizes follow from the tensors."""
    path, state = tmp_path / f"taew2_2.{ending}", tensors(**options) | ENCODER
    torch.save(state, path) if ending == "pth" else save_file(state, path)
    loaded, original = load_tiny_decoder(path), tiny_decoder(**options)
    assert not loaded.training
    assert (loaded.latent_channels, loaded.patch_size) == (5, options.get("patch_size", 2))
    assert loaded.temporal_stride == 4
    assert torch.equal(loaded(latents()), original(latents()))


def test_dtype(tmp_path):
    save_file({name: tensor.half() for name, tensor in tensors().items()}, tmp_path / "a.safetensors")
    stored = load_tiny_decoder(tmp_path / "a.safetensors")
    wide = load_tiny_decoder(tmp_path / "a.safetensors", dtype=torch.float32)
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_every_tensor_is_accounted_for(tmp_path):
    path = tmp_path / "a.safetensors"
    state = tensors()
    lacking = {name: tensor for name, tensor in state.items() if name != "decoder.9.conv.2.bias"}
    save_file(lacking, path)
    with pytest.raises(ValueError, match=r"a.safetensors lacks decoder.9.conv.2.bias"):
        load_tiny_decoder(path)
    save_file(state | {"decoder.23.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds decoder.23.weight, which this model has no place for"):
        load_tiny_decoder(path)
    save_file(state | {"decoder.3.conv.4.bias": torch.zeros(WIDTHS[0] + 1)}, path)
    with pytest.raises(ValueError, match=r"decoder.3.conv.4.bias is \(13,\), it must be \(12,\)"):
        load_tiny_decoder(path)


def test_another_model(tmp_path):
    save_file({"decoder.1.weight": torch.zeros(4, 5, 3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no decoder like taew2_1 or taew2_2: it has no decoder.8.weight"):
        load_tiny_decoder(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tiny_decoder(tmp_path / "b.safetensors")
