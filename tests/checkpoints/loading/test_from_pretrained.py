"""`from_pretrained` of a model: each argument is followed, has no effect, or is refused by name."""

import inspect
import re

import pytest
import torch
from diffusers import ModelMixin

from tests.checkpoints.loading.test_models import assert_same
from wan22 import WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.files import hub
from wan22.checkpoints.loading import models

SUB = {"subfolder": "transformer"}
FILE = tiny_checkpoint() / "transformer/diffusion_pytorch_model.safetensors"
load = WanTransformer3DModel.from_pretrained


def test_every_argument_of_diffusers_is_known():
    names = re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(ModelMixin.from_pretrained))
    assert len(names) > 15
    assert set(names) <= models._OWN | models._OF_DIFFUSERS | {"torch_dtype", "use_safetensors"}


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": False},
        {"low_cpu_mem_usage": True, "disable_mmap": True},
        {"use_safetensors": True, "device_map": None, "output_loading_info": False},
    ],
)
def test_how_it_is_loaded_changes_nothing(options):
    assert_same(load(tiny_checkpoint(), **SUB, **options), load(tiny_checkpoint(), **SUB))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({**SUB, "torch_dtyp": "float16"}, TypeError, "no argument torch_dtyp; the nearest is torch_dtype"),
        ({**SUB, "use_safetensors": False}, FileNotFoundError, r"there is no diffusion_pytorch_model\.bin"),
        ({"subfolder": "transformers"}, FileNotFoundError, "there is no folder .*transformers"),
        ({}, FileNotFoundError, "holds a pipeline, not a model; give subfolder='transformer'"),
    ],
)
def test_what_is_wrong_is_named(options, error, message):
    with pytest.raises(error, match=message):
        load(tiny_checkpoint(), **options)


def test_what_only_diffusers_does_needs_its_layout():
    with pytest.raises(ValueError, match="device_map works with folders in the Diffusers layout"):
        load(FILE, device_map="cpu", attention_head_dim=64)


def test_an_address(monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(FILE))
    model = load("https://huggingface.co/a/b/blob/main/x.safetensors", attention_head_dim=64)
    assert_same(model, load(tiny_checkpoint(), **SUB))


def test_diffusers_loader_takes_the_stored_dtype_too():
    for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float16", torch.float16)):
        model = load(tiny_checkpoint(), **SUB, torch_dtype=dtype, device_map="cpu")
        assert model.blocks[0].attn1.to_q.weight.dtype == expected
