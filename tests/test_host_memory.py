"""What takes more of the host's memory than there is room for is refused before it begins."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.builders import latents_of, load_pipeline, random_pipeline
from tests.checkpoints.lora_writers import make_lora, save
from wan22 import host_memory
from wan22.accel.quantization.layers import is_quantized
from wan22.checkpoints.deferred import deferring, settle
from wan22.checkpoints.loading import fill
from wan22.host_memory import MARGIN

SLOTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint")
    random_pipeline().save_pretrained(place)
    return place


@pytest.fixture
def room(monkeypatch):
    """Leaves so many bytes of room on the host."""
    return lambda nbytes: monkeypatch.setattr(host_memory, "available_ram", lambda: nbytes / (1 - MARGIN))


def linear_bytes(pipe):
    """Bytes of the linear layers of the blocks in int8."""
    blocks = [block for slot in SLOTS for block in getattr(pipe, slot).blocks]
    layers = [module for block in blocks for module in block.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))


def test_quantising_weights_in_files(folder, room):
    """Both experts count, before the first is touched; those in memory make room for themselves."""
    pipe = load_pipeline(folder)
    needed = linear_bytes(pipe)
    room(needed - 1)
    with pytest.raises(MemoryError, match=r"quantizing takes 0\.00 GB of the host") as error:
        pipe.quantize("int8")
    assert str(error.value).endswith("such as `wan22 prepare --dtype fp8` writes")
    assert not any(is_quantized(getattr(pipe, slot)) for slot in SLOTS)
    room(needed)
    pipe.quantize("int8")
    assert all(is_quantized(getattr(pipe, slot)) for slot in SLOTS)
    pipe = load_pipeline(folder, dtype=torch.bfloat16)  # converted, hence in no file
    room(0)
    pipe.quantize("int8")


def test_casting(folder, room):
    pipe = load_pipeline(folder)
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    weights = {id(weight): weight for model in models for weight in model.parameters()}.values()
    needed = sum(weight.numel() for weight in weights) * 8
    room(needed - 1)
    with pytest.raises(
        MemoryError, match=r"to\(torch\.float64\) takes 0\.00 GB .* load with dtype= and memory="
    ):
        pipe.to(torch.float64)
    assert pipe.transformer.dtype == torch.float32
    room(needed)
    pipe.to(torch.float64)
    assert pipe.transformer.dtype == torch.float64
    room(0)
    pipe.to("cpu", torch.float32)


def test_fusing(folder, room, tmp_path):
    """Nothing is fused in either expert if the second one's weights have no room."""
    pipe = load_pipeline(folder)
    expected = latents_of(pipe)
    save(make_lora(pipe.transformer, 0), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    with_lora = latents_of(pipe)
    left = iter([1e9, 0])
    host_memory_left = lambda: next(left)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "available_ram", host_memory_left)
        with pytest.raises(MemoryError, match=r"fusing takes 0\.00 GB .* need not be fused"):
            pipe.fuse_lora()
    assert not pipe.loras.fused_names()
    assert torch.equal(latents_of(pipe), with_lora)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), expected)


def test_converting_what_was_deferred(folder, room, monkeypatch):
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    with deferring():
        pipe = load_pipeline(folder, dtype=torch.bfloat16)
    room(0)
    with pytest.raises(MemoryError, match="converting all weights takes"):
        settle(pipe.transformer)


def test_pages_are_found_by_several_threads(monkeypatch):
    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads, name):
            started.append(threads)
            super().__init__(threads, name)

    monkeypatch.setattr(host_memory, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    buffer = torch.ones(40 * 2**20 + mmap.PAGESIZE, dtype=torch.uint8)
    host_memory.fault_in(buffer)
    assert started == [3]
    assert not buffer[:: mmap.PAGESIZE].any()
    assert buffer.sum() == buffer.numel() - buffer.numel() // mmap.PAGESIZE
    small = torch.ones(2**20, dtype=torch.uint8)
    host_memory.fault_in(small)
    assert started == [3] and small.all()
