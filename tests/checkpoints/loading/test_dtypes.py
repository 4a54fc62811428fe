"""A dtype as every loader takes it: torch's, its name, or "auto" for the stored one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden_data import golden
from wan22 import AutoencoderKLWan, WanI2VPipeline, WanT2VPipeline, WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints import convert
from wan22.checkpoints.loading.dtypes import read_dtype
from wan22.checkpoints.loading.tiny_autoencoder import load_tiny_decoder

FILE = tiny_checkpoint() / "transformer/diffusion_pytorch_model.safetensors"
VAE = tiny_checkpoint() / "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("auto", None),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("Float16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_names(given, expected):
    assert read_dtype(given) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("bflaot16", ValueError, r"dtype='bflaot16' must be .* 'auto'; the nearest is 'bfloat16'"),
        ("automatic", ValueError, "the nearest is 'auto'"),
        ("", ValueError, "dtype='' must be"),
        ("nn", ValueError, "dtype='nn' must be"),
        ("x" * 9000, ValueError, r"^.{0,250}$"),
        (torch.int8, ValueError, "dtype=torch.int8: models do not compute in it"),
        ("float8_e4m3fn", ValueError, "do not compute in it; call enable_layerwise_casting after loading"),
        (16, TypeError, "dtype=16 is a int; it must be a dtype of torch, or its name"),
    ],
)
def test_anything_else_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        read_dtype(given)


def linear(model):
    return model.blocks[0].attn1.to_q.weight.dtype


LOADERS = {
    "model": lambda d: linear(
        WanTransformer3DModel.from_pretrained(tiny_checkpoint(), subfolder="transformer", **d)
    ),
    "model's file": lambda d: linear(
        WanTransformer3DModel.from_single_file(FILE, attention_head_dim=64, **d)
    ),
    "autoencoder": lambda d: AutoencoderKLWan.from_single_file(VAE, **d).decoder.conv_in.weight.dtype,
    "pipeline": lambda d: linear(WanT2VPipeline.from_pretrained(tiny_checkpoint(), **d).transformer),
    "pipeline's encoder": lambda d: WanT2VPipeline.from_pretrained(tiny_checkpoint(), **d).text_encoder.dtype,
    "image pipeline": lambda d: linear(
        WanI2VPipeline.from_pretrained(tiny_checkpoint("ti2v"), **d).transformer
    ),
    "pipeline's files": lambda d: linear(
        WanT2VPipeline.from_single_file(FILE, vae=VAE, attention_head_dim=64, **d).transformer
    ),
}


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader(loader, argument):
    load = LOADERS[loader]
    assert load({argument: "float16"}) == torch.float16
    assert load({argument: "auto"}) == load({}), "as stored"
    with pytest.raises(ValueError, match=r"dtype='float17' .* nearest is 'float16'"):
        load({argument: "float17"})


def test_by_component():
    pipe = WanT2VPipeline.from_pretrained(
        tiny_checkpoint(), dtype={"transformer": "bfloat16", "vae": "auto", "default": "torch.float16"}
    )
    assert linear(pipe.transformer) == torch.bfloat16
    assert pipe.vae.dtype == load_file(VAE)["decoder.conv_in.weight"].dtype
    assert pipe.text_encoder.dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype\['vae'\]='flaot32' .* nearest is 'float32'"):
        WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype={"vae": "flaot32"})
    with pytest.raises(ValueError, match=r"'transfromer' must be one of .* the nearest is 'transformer'"):
        WanT2VPipeline.from_pretrained(tiny_checkpoint(), torch_dtype={"transfromer": "bfloat16"})


def test_a_pipeline_from_another():
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("ti2v"), dtype="float32")
    assert linear(WanI2VPipeline.from_pipe(pipe).transformer) == torch.float32
    assert linear(WanI2VPipeline.from_pipe(pipe, torch_dtype="float16").transformer) == torch.float16
    with pytest.raises(ValueError, match="nearest is 'float16'"):
        WanI2VPipeline.from_pipe(pipe, dtype="float17")


def test_the_converter(tmp_path):
    convert(FILE, tmp_path / "w.safetensors", "single-file", dtype="torch.float16", attention_head_dim=64)
    assert {w.dtype for w in load_file(tmp_path / "w.safetensors").values()} == {torch.float16}


def test_a_tiny_decoder(tmp_path):
    with pytest.raises(ValueError, match="nearest is 'bfloat16'"):
        save_file(golden("vae21").weights, tmp_path / "w.safetensors")
        load_tiny_decoder(tmp_path / "w.safetensors", dtype="bloat16")
