"""The host's own device: weights that the CPU cannot use where they lie pass through scratch memory."""

import copy

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.accel.offload.offloaders import streamed
from tests.builders import latents_of, load_pipeline, random_pipeline
from wan22.accel.offload.devices import HostDevice
from wan22.accel.offload.layout import Placement, packed_blocks
from wan22.accel.offload.offloader import ModelOffloader
from wan22.checkpoints.deferred import deferred_weights, deferring
from wan22.checkpoints.loading import alignment, fill
from wan22.pipelines.attached import memory

MODELS = ("text_encoder", "transformer", "transformer_2", "vae")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose weights do not lie where the CPU's kernels want them."""
    random_pipeline().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        shift(file, 8)
    return tmp_path


def shift(file, nbytes):
    """Let a file's tensors begin so many bytes after a multiple of 64."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((nbytes - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert load_file(file)


class Scratch(HostDevice):
    """Counts what is allocated."""

    def __init__(self):
        super().__init__()
        self.allocated = 0

    def allocate(self, nbytes):
        self.allocated += nbytes
        return super().allocate(nbytes)


def everywhere(placement, vae="on_demand"):
    return dict.fromkeys(MODELS, placement) | {"vae": Placement(vae)}


@pytest.mark.parametrize("placement", [streamed(), streamed(1, 3), Placement("on_demand")], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_video_is_that_of_copied_weights(dtype, placement, folder, monkeypatch):
    """To the bit, of files in another dtype, too; and the weights stay where they were."""
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    plain = load_pipeline(folder, dtype=dtype)
    expected = latents_of(plain, output_type="pt")
    with deferring():
        pipe = load_pipeline(folder, dtype=dtype)
    assert bool(list(deferred_weights(pipe.transformer))) == (dtype is not None)
    before = {name: weight.data_ptr() for name, weight in pipe.transformer.named_parameters()}
    models = {name: (getattr(pipe, name), p) for name, p in everywhere(placement).items()}
    offloader = ModelOffloader(models, HostDevice())
    offloader.attach()
    for _ in range(2):
        assert torch.equal(latents_of(pipe, output_type="pt"), expected)
        offloader.offload_transient()
        assert all(weight.stored_bytes for weight in deferred_weights(pipe.transformer))
    offloader.detach()
    assert before == {name: weight.data_ptr() for name, weight in pipe.transformer.named_parameters()}


@pytest.mark.parametrize("nbytes", [0, 8, 32])
def test_only_weights_that_are_not_aligned_pass_through(nbytes, folder):
    for file in folder.rglob("*.safetensors"):
        shift(file, nbytes)
    model = load_pipeline(folder).transformer
    passing = {id(t.owners[0]) for block in packed_blocks(model, host=True) for t in block.tensors}
    assert passing == {id(p) for p in model.parameters() if p.data_ptr() % alignment.CPU_ALIGNMENT}
    assert passing or not nbytes


def test_a_model_on_the_host_beside_a_gpu_passes_through(folder):
    """Its weights are not copied for good."""
    pipe = load_pipeline(folder)
    expected = latents_of(load_pipeline(folder))
    device = Scratch()
    device.is_host = False  # any other device
    placed = everywhere(Placement("on_demand")) | {"text_encoder": Placement("host")}
    offloader = ModelOffloader({name: (getattr(pipe, name), p) for name, p in placed.items()}, device)
    offloader.attach()
    before = {name: weight.data_ptr() for name, weight in pipe.text_encoder.named_parameters()}
    assert torch.equal(latents_of(pipe), expected)
    offloader.offload_transient()
    assert before == {name: weight.data_ptr() for name, weight in pipe.text_encoder.named_parameters()}


def test_weights_that_the_host_has_no_room_for(folder, monkeypatch, caplog):
    """They pass through scratch memory though nothing was asked for; .to("cpu") takes the plan away."""
    expected = latents_of(load_pipeline(folder))
    pipe = load_pipeline(folder)
    copied = sum(
        weight.nbytes for name in MODELS for weight in alignment.unaligned_weights(getattr(pipe, name))
    )
    monkeypatch.setattr(memory, "available_ram", lambda: 2 * copied - 2)
    monkeypatch.setattr("wan22.accel.planning.machine.available_ram", lambda: psutil.virtual_memory().total)
    with caplog.at_level("INFO"):
        assert torch.equal(latents_of(pipe), expected)
    assert pipe.memory_plan is not None
    assert "the host has no room for all weights at once" in caplog.text
    assert torch.equal(
        latents_of(pipe, height=48, width=48), latents_of(load_pipeline(folder), height=48, width=48)
    )
    pipe.to("cpu")
    assert pipe.memory_plan is None
    monkeypatch.setattr(memory, "available_ram", lambda: 2 * copied)
    assert torch.equal(latents_of(copy.copy(pipe)), expected)
    assert pipe.memory_plan is None
