"""Folders in the Diffusers layout whose transformers are in float8, as after layerwise casting."""

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import load_pipeline
from wan22 import tiny_checkpoint
from wan22.accel.offload.layout import bytes_of
from wan22.checkpoints.quantized_linear import QuantizedLinear
from wan22.pipelines.loading.checkpoint import Wanted
from wan22.pipelines.loading.load import locate

BFLOAT16 = {"default": torch.bfloat16}
EXPERTS = ("transformer", "transformer_2")


def latents(pipe):
    return pipe("a red circle", seed=1, num_inference_steps=2, output_type="latent").frames


@pytest.fixture(scope="module")
def cast():
    """A pipeline with layerwise casting, and its latents."""
    pipe = load_pipeline(tiny_checkpoint(), dtype=BFLOAT16)
    for name in EXPERTS:
        getattr(pipe, name).enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )
    return pipe, latents(pipe)


@pytest.fixture(scope="module")
def folder(cast, tmp_path_factory):
    """Its folder, with the transformers' weights as they are stored."""
    folder = tmp_path_factory.mktemp("float8")
    cast[0].save_pretrained(folder)
    for name in EXPERTS:
        weights = {n: w.contiguous() for n, w in getattr(cast[0], name).state_dict().items()}
        assert weights["blocks.0.attn1.to_q.bias"].dtype == torch.float8_e4m3fn
        save_file(weights, folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [None, "auto", BFLOAT16])
def test_float8_stays_float8(cast, folder, dtype):
    pipe = load_pipeline(folder, dtype=dtype)
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, QuantizedLinear)
    assert torch.equal(latents(pipe), cast[1])


def test_our_own_save_gives_the_same_video(cast, tmp_path):
    cast[0].save_pretrained(tmp_path)
    assert torch.equal(latents(load_pipeline(tmp_path)), cast[1])


def test_the_outline_has_the_bytes_of_what_is_loaded(folder):
    pipe, outline = load_pipeline(folder), locate(str(folder), {}).outline(Wanted())
    for name, model in outline.items():
        assert bytes_of(model) == bytes_of(getattr(pipe, name)), name
