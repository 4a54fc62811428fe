"""Keywords of the loaders: unknown ones are refused with the nearest name, before anything is looked for."""

import copy
import inspect
import re

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin

from tests.builders import random_pipeline
from wan22 import AutoencoderKLWan, FlowMatchUniPCScheduler, WanI2VPipeline, WanT2VPipeline
from wan22 import WanTransformer3DModel as Transformer
from wan22.checkpoints.loading.saving import _OF_PUSHING
from wan22.checkpoints.loading.single_file import STEERING
from wan22.downloads import OPTIONS
from wan22.pipelines.loading.arguments import OF_DIFFUSERS

LOADERS = {
    "t2v": (WanT2VPipeline.from_pretrained, {"memori": "memory", "quantise": "quantize", "lora": "loras"}),
    "i2v": (WanI2VPipeline.from_pretrained, {"image_encoderr": "image_encoder", "torch_dtyp": "torch_dtype"}),
    "files": (WanT2VPipeline.from_single_file, {"text_encode": "text_encoder", "boundary": "boundary_ratio"}),
    "transformer": (Transformer.from_pretrained, {"dtyp": "dtype", "dequantise": "dequantize"}),
    "scheduler": (
        FlowMatchUniPCScheduler.from_pretrained,
        {"flow_shif": "flow_shift", "revison": "revision"},
    ),
    "vae": (AutoencoderKLWan.from_pretrained, {"subfoldr": "subfolder"}),
}


@pytest.mark.parametrize(
    ("loader", "wrong", "nearest"),
    [(loader, *names) for loader, (_, wrong) in LOADERS.items() for names in wrong.items()],
)
def test_an_unknown_keyword(loader, wrong, nearest):
    with pytest.raises(TypeError, match=rf"has no argument {wrong}; the nearest is {nearest}$"):
        LOADERS[loader][0]("org/nothing", **{wrong: None})


def test_keys_of_the_table_of_dtypes():
    with pytest.raises(ValueError, match=r"'transformerr' must be one of .*; the nearest is 'transformer'"):
        WanT2VPipeline.from_pretrained("org/nothing", dtype={"transformerr": "bf16"})


def test_keywords_of_diffusers_are_known():
    source = inspect.getsource(DiffusionPipeline.from_pretrained)
    taken = set(re.findall(r'kwargs\.pop\("(\w+)"', source))
    assert len(taken) > 20
    assert taken <= {*OF_DIFFUSERS, *OPTIONS, *STEERING, "dtype"}


SAVED = {
    "pipeline": (lambda: random_pipeline(), "WanT2VPipeline"),
    "transformer": (lambda: random_pipeline().transformer, "WanTransformer3DModel"),
    "vae": (lambda: random_pipeline().vae, "AutoencoderKLWan"),
}


@pytest.mark.parametrize("what", SAVED)
def test_keywords_of_saving(what, tmp_path):
    """diffusers takes any: a mistyped one would be another file than was asked for."""
    made, name = SAVED[what]
    message = rf"{name}.save_pretrained has no argument max_shard_sise; the nearest is max_shard_size"
    with pytest.raises(TypeError, match=message):
        made().save_pretrained(tmp_path / "saved", max_shard_sise="1GB")
    assert not (tmp_path / "saved").exists()
    made().save_pretrained(tmp_path / "saved", max_shard_size="1GB", commit_message="unused", token=None)


def test_keywords_of_pushing_are_known():
    for method in (DiffusionPipeline.save_pretrained, ModelMixin.save_pretrained):
        taken = re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(method))
        assert set(taken) == set(_OF_PUSHING)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_pipeline_is_cast(name):
    pipe = copy.deepcopy(random_pipeline())
    assert pipe.to(**{name: torch.bfloat16}).transformer.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"pipe.to has no argument dtyp; the nearest is dtype"):
        pipe.to(dtyp=torch.float32)
