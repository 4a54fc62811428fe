"""A pipeline that was saved with its transformers in float8 loads in it, and gives the same video."""

import pytest
import torch

from tests.builders import load_pipeline
from wan22 import tiny_checkpoint
from wan22.accel.offload.layout import bytes_of
from wan22.checkpoints.loading.quantized_linear import QuantizedLinear
from wan22.pipelines.loading.checkpoint import Wanted
from wan22.pipelines.loading.load import locate

BFLOAT16 = {"default": torch.bfloat16}


def latents(pipe):
    return pipe("a red circle", seed=1, num_inference_steps=2, output_type="latent").frames


@pytest.fixture(scope="module")
def cast(tmp_path_factory):
    """A folder saved after layerwise casting, and the latents from before it was saved."""
    pipe, folder = load_pipeline(tiny_checkpoint(), dtype=BFLOAT16), tmp_path_factory.mktemp("cast")
    for transformer in (pipe.transformer, pipe.transformer_2):
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = latents(pipe)
    pipe.save_pretrained(folder)
    return folder, expected


@pytest.mark.parametrize("dtype", [None, "auto", BFLOAT16])
def test_a_pipeline_saved_after_layerwise_casting(cast, dtype):
    folder, expected = cast
    pipe = load_pipeline(folder, dtype=dtype)
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, QuantizedLinear)
    assert torch.equal(latents(pipe), expected)


def test_its_outline_has_the_bytes_of_what_is_loaded(cast):
    pipe, outline = load_pipeline(cast[0]), locate(str(cast[0]), {}).outline(Wanted())
    for name, model in outline.models.items():
        assert bytes_of(model) == bytes_of(getattr(pipe, name)), name
