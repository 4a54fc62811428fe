"""Keywords of the loaders: unknown ones are refused with the nearest name, before anything is looked for."""

import inspect
import re

import pytest
from diffusers import DiffusionPipeline

from wan22 import AutoencoderKLWan, FlowMatchUniPCScheduler, WanI2VPipeline, WanT2VPipeline
from wan22 import WanTransformer3DModel as Transformer
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
