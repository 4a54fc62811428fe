"""Small pipelines with more blocks than buffers, and the devices that their models live on in tests."""

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import UMT5EncoderModel

from tests.accel.offload.recording import RecordingDevice
from tests.builders import SMALL, random_i2v_pipeline, random_pipeline, random_ti2v_pipeline
from wan22 import WanTransformer3DModel
from wan22.accel.offload.devices import CudaDevice
from wan22.accel.offload.layout import Placement
from wan22.accel.offload.offloader import ModelOffloader

LAYERS = 5
CHUNK = 4096  # so that most blocks take several
NAMES = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")
ON_DEMAND = Placement("on_demand")
# Test bodies run on the stand-in, and on a GPU where there is one.
DEVICES = [
    "recording",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]


def make_device(kind):
    return RecordingDevice() if kind == "recording" else CudaDevice("cuda")


def streamed(resident_blocks=0, buffers=2, source="mmap"):
    return Placement("streamed", resident_blocks, buffers, source)


@functools.cache
def _deeper(model, layers):
    """A random model like another one, with more blocks."""
    torch.manual_seed(11)
    if isinstance(model, WanTransformer3DModel):
        other = WanTransformer3DModel.from_config({**model.config, "num_layers": layers})
    else:
        config = copy.deepcopy(model.config)
        config.num_layers = layers
        other = UMT5EncoderModel(config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other.eval()


FORMS = {
    "t2v": random_pipeline,
    "i2v": random_i2v_pipeline,
    "i2v-2.1": functools.partial(random_i2v_pipeline, experts=1),
    "ti2v": random_ti2v_pipeline,
}


def make_pipe(form="t2v"):
    """A pipeline whose models may be changed."""
    pipe = FORMS[form]()
    for name in NAMES:
        model = getattr(pipe, name, None)
        if model is not None:
            deep = name.startswith(("text", "transformer"))
            setattr(pipe, name, copy.deepcopy(_deeper(model, LAYERS) if deep else model))
    return pipe


def models_of(pipe):
    found = {name: getattr(pipe, name, None) for name in NAMES}
    return {name: model for name, model in found.items() if model is not None}


def offload(pipe, device, default=ON_DEMAND, **placements):
    """Attach an offloader to all models of a pipeline."""
    models = {name: (model, placements.get(name, default)) for name, model in models_of(pipe).items()}
    return attached(ModelOffloader(models, device))


def attached(offloader):
    """Attach an offloader whose copies are recorded, and whose staging buffer is small."""
    device, loader = offloader.device, offloader._loader
    loader.chunk_bytes = CHUNK
    if isinstance(device, RecordingDevice):
        device.watch(loader)
    offloader.attach()
    return offloader


def video(pipe, **arguments):
    """A video of text, or of an image where the pipeline takes one."""
    size = 32 if pipe.config.expand_timesteps else 16
    arguments = {**SMALL, "seed": 7, "output_type": "pt", "height": size, "width": size, **arguments}
    if pipe.config.boundary_ratio is None:
        del arguments["guidance_scale_2"]
    if hasattr(pipe, "image_encoder"):
        rng = np.random.default_rng(0)
        arguments["image"] = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    return pipe(prompt="a red circle", **arguments).frames


@functools.cache
def plain(form="t2v", kind="recording"):
    """What a pipeline makes whose models are all where they run."""
    return video(make_pipe(form).to("cpu" if kind == "recording" else "cuda")).cpu()


def inputs_of(model, seed=0):
    """Arguments for one call of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    return {
        "hidden_states": torch.randn(1, config.in_channels, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, config.text_dim, generator=generator),
    }


@torch.no_grad()
def velocity(model, seed=0):
    return model(**inputs_of(model, seed)).sample.cpu()


def addresses(model):
    return {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
