"""Blocks that pass through buffers compute what they always compute, whatever happens on the way."""

import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from safetensors.torch import load_file, save_file

from tests.accel.offload.offloaders import (
    DEVICES,
    LAYERS,
    ON_DEMAND,
    addresses,
    attached,
    inputs_of,
    make_device,
    make_pipe,
    offload,
    plain,
    streamed,
    velocity,
    video,
)
from tests.accel.offload.recording import RecordingDevice
from tests.checkpoints import writers
from tests.checkpoints.lora_writers import DIALECTS, make_lora
from tests.golden_data import relative_error
from wan22 import WanTransformer3DModel
from wan22.accel.offload import streaming
from wan22.accel.offload.layout import PackedBlock, Placement, device_bytes
from wan22.accel.offload.offloader import ModelOffloader
from wan22.checkpoints.loading.alignment import align_weights
from wan22.checkpoints.loading.diffusers_attention import WanAttnProcessor
from wan22.checkpoints.naming.keys import TRANSFORMER

SOURCES = ("mmap", "pinned")


def alone(model, device, placement, name="transformer"):
    """Attach an offloader to one model."""
    return attached(ModelOffloader({name: (model, placement)}, device))


def expected_of(model, kind, seed=0):
    """What a model computes that is all where it runs; it is on the CPU again then."""
    if kind == "recording":
        return velocity(model, seed)
    inputs = {name: value.to("cuda") for name, value in inputs_of(model, seed).items()}
    with torch.no_grad():
        found = model.to("cuda")(**inputs).sample.cpu()
    model.to("cpu")
    return found


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("resident", range(LAYERS + 1))
def test_any_number_of_blocks(resident, buffers, source, kind):
    """Pass after pass, while nothing but the buffers is taken."""
    model, device = make_pipe().transformer, make_device(kind)
    expected = [expected_of(model, kind, seed) for seed in range(4)]
    before, placement = addresses(model), streamed(resident, buffers, source)
    offloader = alone(model, device, placement)
    for seed in range(4):
        assert torch.equal(velocity(model, seed), expected[seed])
    if kind == "recording":
        assert device.peak == device.resident == device_bytes(model, placement)
    offloader.offload_transient()
    if source == "mmap":
        assert addresses(model) == before
    if kind == "recording":
        assert device.resident == 0
    offloader.detach()
    assert torch.equal(velocity(model), expected_of(make_pipe().transformer, "recording"))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
def test_text_encoder(source, kind):
    """Its blocks lie deeper, and its embedding is tied."""
    pipe, device = make_pipe(), make_device(kind)
    offload(pipe, device, text_encoder=streamed(1, 2, source), image_encoder=streamed())
    assert torch.equal(video(pipe).cpu(), plain("t2v", kind))


def test_each_block_travels_once_a_pass():
    """And the first ones of the next pass while the last ones compute."""
    model, device = make_pipe().transformer, RecordingDevice()
    offloader = alone(model, device, streamed(0, 2, "pinned"))
    blocks = [f"transformer.{i}" for i in range(LAYERS)]
    velocity(model)
    first = ["transformer.rest", *blocks, *blocks[:2]]
    assert sorted(copies(device)) == sorted(first)  # a thread packs blocks meanwhile
    velocity(model)
    assert copies(device)[len(first) :] == [*blocks[2:], *blocks[:2]]
    order = [(record.kind, record.what) for record in device.records]
    order = order[len(order) - order[::-1].index(("arrive", "transformer.3")) :]
    assert ("copy", "transformer.0") in order[: order.index(("arrive", "transformer.4"))]
    offloader.detach()


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("form", ["t2v", "i2v", "i2v-2.1", "ti2v"])
def test_passes_in_turn_share_the_weights(form, kind):
    """Two passes of two videos: a block's weights come once a step, and no bit of the videos changes."""
    several = {"num_videos_per_prompt": 2, "num_inference_steps": 3}
    pipe, device = make_pipe(form), make_device(kind)
    expected = video(pipe.to("cpu" if kind == "recording" else "cuda"), **several).cpu()
    pipe.to("cpu")
    offload(pipe, device, transformer=streamed(1, 2), transformer_2=streamed(1, 2))
    apart = video(pipe, **several).cpu()
    assert torch.equal(apart, expected)
    sent = device.copied("transformer") if kind == "recording" else 0
    for model in pipe.transformers:
        model.set_samples_in_turn()
    assert torch.equal(video(pipe, **several).cpu(), expected)
    if kind == "recording":
        # What stays on the device, and what is on its way when a model ends, comes as often as before.
        assert device.copied("transformer") - sent < sent / 2


@torch.no_grad()
def test_a_step_cache_gets_pass_by_pass():
    """It keeps what it skips by pass; so does attention that a caller has put in place."""
    pipe = make_pipe()
    expected = video(pipe)
    order = []
    for model in pipe.transformers:
        model.set_samples_in_turn()
        model.register_forward_pre_hook(
            lambda m, a, k: order.append(len(k["hidden_states"])), with_kwargs=True
        )
    assert torch.equal(video(pipe), expected)
    assert set(order) == {2}
    for model in pipe.transformers:
        model.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    order.clear()
    video(pipe)
    assert set(order) == {1}
    for model in pipe.transformers:
        model.disable_cache()
        model.blocks[1].attn1.set_processor(
            lambda attn, *args, **kwargs: WanAttnProcessor()(attn, *args, **kwargs)
        )
    order.clear()
    assert torch.equal(video(pipe), expected)
    assert set(order) == {1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_the_host_does_not_wait():
    """No operation of a pass makes it, but those that the model has anyway."""

    def waits():
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                model(**inputs)
            return sum("synchronizing" in str(warning.message) for warning in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = make_pipe().transformer
    inputs = {name: value.to("cuda") for name, value in inputs_of(model).items()}
    anyway = (model.to("cuda")(**inputs), waits())[1]
    offloader = alone(model.to("cpu"), make_device("cuda"), streamed(1, 2, "pinned"))
    model(**inputs)  # packs the blocks
    assert waits() == anyway
    offloader.detach()


def copies(device):
    return [record.what for record in device.records if record.kind == "copy"]


def test_resident_blocks_travel_once_and_lie_apart():
    model, device = make_pipe().transformer, RecordingDevice()
    alone(model, device, streamed(2, 2, "pinned"))
    for _ in range(3):
        velocity(model)
        there = [all(map(device.holds, block.parameters())) for block in model.blocks]
        assert there == [False, False, True, False, True]
        assert not any(map(device.holds, model.blocks[3].parameters()))
    times = {i: copies(device).count(f"transformer.{i}") for i in range(LAYERS)}
    assert [i for i, count in times.items() if count == 1] == [2, 4]


def test_blocks_compute_with_what_is_in_their_slot_and_nothing_else_looks_at_them(monkeypatch):
    """The values at home are NaN while the model runs, but for those who copy."""
    pipe = make_pipe()
    offload(pipe, RecordingDevice(), **{n: streamed(1) for n in ("transformer", "text_encoder")})
    home = PackedBlock.point_to_host

    def nowhere(self):
        for tensor in self.tensors:
            filled = torch.full_like(tensor.host, float("nan") if tensor.host.is_floating_point() else -1)
            tensor.point_to(filled)

    send = streaming.ModelStreamer._send

    def sent(self):
        send(self)
        for index in self._index_in_pool:
            nowhere(self._blocks[index])

    monkeypatch.setattr(streaming.BlockBufferPool, "release", releasing(nowhere))
    monkeypatch.setattr(streaming.ModelStreamer, "_send", sent)
    assert PackedBlock.point_to_host is home
    assert torch.equal(video(pipe), plain("t2v"))


def releasing(where):
    release = streaming.BlockBufferPool.release

    def released(self):
        block = self._current
        release(self)
        if block is not None:
            where(block)

    return released


def test_tied_weights_travel_once_and_stay_tied():
    encoder, device = make_pipe().text_encoder, RecordingDevice()
    encoder.encoder.embed_tokens.weight = torch.nn.Parameter(encoder.shared.weight.data)  # by their memory
    tied = (encoder.shared.weight, encoder.encoder.embed_tokens.weight)
    home = tied[0].data_ptr()
    offloader = alone(encoder, device, ON_DEMAND, "text_encoder")
    with torch.no_grad():
        encoder(torch.tensor([[3, 4, 1]]))
    assert device.copied() == device.resident == device_bytes(encoder, ON_DEMAND)
    assert tied[0].data_ptr() == tied[1].data_ptr() != home
    offloader.offload_transient()
    assert tied[0].data_ptr() == tied[1].data_ptr() == home


# ---- the tests see mistakes ----


class Hasty(RecordingDevice):
    """Computes without waiting for copies."""

    def wait(self, mark):
        self._released.pop(mark.address, None)


class Early(RecordingDevice):
    """Lets copies overwrite what is still to be computed with."""

    def release(self, buffer):
        point = super().release(buffer)
        for address, other in list(self.buffers.items()):
            if address != point.address:
                other.fill_(255)
        return point

    def allocate(self, nbytes):
        buffer = super().allocate(nbytes)
        self.buffers = getattr(self, "buffers", {})
        self.buffers[buffer.data_ptr()] = buffer
        return buffer


@pytest.mark.parametrize("device", [Hasty, Early])
def test_a_missing_wait_shows(device):
    model = make_pipe().transformer
    expected = velocity(model)
    alone(model, device(), streamed(0, 2, "pinned"))
    assert not torch.equal(velocity(model), expected)


def test_a_slot_that_is_given_away_while_its_block_computes_shows(monkeypatch):
    model = make_pipe().transformer
    expected = velocity(model)
    alone(model, RecordingDevice(), streamed(0, 2, "pinned"))
    acquire = streaming.BlockBufferPool.acquire

    def too_early(self, index):
        acquire(self, index)
        self.loader.send(self.blocks[index], self._buffer(self._next).memory, "pinned")

    monkeypatch.setattr(streaming.BlockBufferPool, "acquire", too_early)
    assert not torch.equal(velocity(model), expected)


def test_a_part_of_the_pinned_buffer_that_is_reused_too_early_shows(monkeypatch):
    model = make_pipe().transformer
    expected = velocity(model)
    device = RecordingDevice()
    alone(model, device, streamed())
    monkeypatch.setattr(device, "finish", lambda mark: None)
    monkeypatch.setattr(device, "wait", lambda mark: RecordingDevice.finish(device, mark))
    assert not torch.equal(velocity(model), expected)


# ---- what happens on the way ----


class Stop(BaseException):
    """Like Ctrl-C: no Exception."""


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("at", range(LAYERS))
def test_after_an_exception_in_a_block(at, error, source, kind):
    model = make_pipe().transformer
    expected = expected_of(model, kind)
    before = addresses(model)
    offloader = alone(model, make_device(kind), streamed(1, 2, source))

    def fail(*_):
        raise error

    for _ in range(2):
        handle = model.blocks[at].attn2.register_forward_pre_hook(fail)
        with pytest.raises(error):
            velocity(model)
        handle.remove()
        assert torch.equal(velocity(model), expected)
    handle = model.blocks[at].attn2.register_forward_pre_hook(fail)
    with pytest.raises(error):
        velocity(model)
    handle.remove()
    offloader.offload_transient()
    if source == "mmap":
        assert addresses(model) == before
    assert torch.equal(velocity(model), expected)


@torch.no_grad()
def test_blocks_left_out_and_called_again():
    """As step caches do."""
    model, other = make_pipe().transformer, make_pipe().transformer
    given = []
    hook = other.blocks[0].register_forward_pre_hook(lambda m, a, k: given.append((a, k)), with_kwargs=True)
    velocity(other)
    hook.remove()
    args, kwargs = given[0]
    device = RecordingDevice()
    offloader = alone(model, device, streamed(0, 2, "pinned"))
    offloader.onload("transformer")
    for i in (0, 3, 3, 2, 4, 0, 1, 1, 4, 2):
        assert torch.equal(model.blocks[i](*args, **kwargs), other.blocks[i](*args, **kwargs))
    with pytest.raises(TypeError):
        model.blocks[1]()
    assert any(map(device.holds, model.blocks[1].parameters()))
    model.blocks[3](*args, **kwargs)
    held = [any(map(device.holds, block.parameters())) for block in model.blocks]
    assert held == [False, False, False, True, False]
    assert torch.equal(velocity(model), velocity(other))
    assert not any(map(device.holds, model.blocks.parameters()))


def test_gradients_are_refused():
    model = make_pipe().transformer
    offloader = alone(model, RecordingDevice(), streamed())
    with pytest.raises(ValueError, match=r"transformer is streamed, without gradients.*no_grad"):
        model(**inputs_of(model))
    model.requires_grad_(False)
    model(**inputs_of(model))
    offloader.detach()


@pytest.mark.parametrize("source", SOURCES)
def test_in_inference_mode_and_out_of_it(source):
    model = make_pipe().transformer
    expected = velocity(model)
    offloader = alone(model, RecordingDevice(), streamed(1, 2, source))
    with torch.inference_mode():
        assert torch.equal(model(**inputs_of(model)).sample, expected)
    assert torch.equal(velocity(model), expected)
    offloader.detach()
    assert not any(p.is_inference() for p in model.parameters())
    model(**inputs_of(model)).sample.sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_blocks(whole, kind):
    """Hooks are outside of what is compiled, be it a block's forward or, graph break and all, its call."""
    torch._dynamo.reset()
    model = make_pipe().transformer
    expected = expected_of(model, kind)
    offloader = alone(model, make_device(kind), streamed(1, 2, "pinned"))
    for block in model.blocks:
        if whole:
            block.compile(backend="eager")
        else:
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    for _ in range(3):
        assert relative_error(velocity(model), expected) <= 1e-6  # rotation is another kernel there
    offloader.detach()
    assert relative_error(velocity(model), expected_of(make_pipe().transformer, "recording")) <= 1e-6


# ---- kinds of weights ----


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
def test_quantised_weights(source, kind, tmp_path):
    model = make_pipe().transformer
    official = {TRANSFORMER.inverse.rename(name): w for name, w in model.state_dict().items()}
    writers.grouped(official, tmp_path / "w.safetensors")
    options = {"dtype": torch.float32, "attention_head_dim": model.config.attention_head_dim}
    model = WanTransformer3DModel.from_single_file(tmp_path / "w.safetensors", **options)
    align_weights(model)  # the CPU's results depend on that
    expected = expected_of(model, kind)
    device = make_device(kind)
    offloader = alone(model, device, streamed(1, 2, source))
    for _ in range(2):
        assert torch.equal(velocity(model), expected)
    if kind == "recording":
        assert (
            device.peak
            == device_bytes(model, streamed(1))
            < device_bytes(make_pipe().transformer, streamed(1))
        )
    offloader.detach()
    assert torch.equal(velocity(model), expected_of(model, "recording"))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
def test_loras_that_come_and_go(source, kind, tmp_path):
    """Loaded into models that are managed: blocks are of unequal sizes then, and buffers as large as any."""
    pipe, other = make_pipe(), make_pipe()
    table = make_lora(pipe.transformer, 5, share=0.5)
    path = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in DIALECTS["diffusion_model, alpha"](table).items()}, path)
    other.load_lora_weights(path)
    expected = video(other.to("cuda" if kind == "cuda" else "cpu")).cpu()
    device = make_device(kind)
    offloader = offload(pipe, device, transformer=streamed(1, 2, source), transformer_2=ON_DEMAND)
    assert torch.equal(video(pipe).cpu(), plain("t2v", kind))
    offloader.offload_all()
    pipe.load_lora_weights(path)
    assert torch.equal(video(pipe).cpu(), expected)
    offloader.offload_all()
    pipe.unload_lora_weights()
    assert torch.equal(video(pipe).cpu(), plain("t2v", kind))
    offloader.detach()
    assert torch.equal(video(pipe), plain("t2v"))


@pytest.mark.parametrize("kind", DEVICES)
@torch.no_grad()
def test_different_dtypes_in_one_slab(kind):
    def make():
        model = make_pipe().transformer
        for layer in model.modules():
            if type(layer) is torch.nn.Linear:
                layer.to(torch.bfloat16)
        return model

    model, other = make(), make()
    inputs = inputs_of(model)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].bfloat16()
    offloader = alone(model, make_device(kind), streamed(0, 2, "pinned"))
    where = offloader.device.torch_device
    expected = other.to(where)(**{name: value.to(where) for name, value in inputs.items()}).sample
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
def test_memory_formats_are_kept(source, kind):
    pipe = make_pipe()
    for parameter in pipe.vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    weight = pipe.vae.decoder.conv_in.weight
    assert not weight.is_contiguous()
    before, seen = (weight.data_ptr(), weight.stride()), []
    pipe.vae.decoder.conv_in.register_forward_pre_hook(
        lambda *_: seen.append((weight.data_ptr(), weight.stride()))
    )
    expected = video(pipe.to("cuda" if kind == "cuda" else "cpu")).cpu()
    pipe.to("cpu")
    before = weight.stride()
    offloader = offload(pipe, make_device(kind), vae=Placement("on_demand", source=source))
    assert torch.equal(video(pipe).cpu(), expected)
    assert seen[0][1] == seen[-1][1] == before
    assert seen[0][0] != seen[-1][0]
    offloader.detach()
    assert weight.stride() == before


# ---- sources ----


def mapped_model(tmp_path):
    """A transformer whose weights are in a file, in memory as well."""
    path = tmp_path / "weights.safetensors"
    save_file(make_pipe().transformer.state_dict(), path)
    model = make_pipe().transformer
    model.load_state_dict(load_file(path), assign=True)
    return model, path


def mapping_of(address):
    """The file at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, *_, file = line.split()
        first, last = (int(end, 16) for end in ends.split("-"))
        if first <= address < last:
            return file
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("placement", ["on_demand", "streamed", "resident"])
def test_weights_in_files_stay_in_files(placement, source, kind, tmp_path):
    model, path = mapped_model(tmp_path)
    before = addresses(model)
    assert {mapping_of(address) for address in before.values()} == {str(path)}
    expected = expected_of(make_pipe().transformer, kind)
    offloader = alone(model, make_device(kind), Placement(placement, source=source))
    assert torch.equal(velocity(model), expected)
    offloader.offload_transient()
    if placement != "resident":
        assert (addresses(model) == before) is (source == "mmap")
    assert torch.equal(velocity(model), expected)
    offloader.detach()
    assert addresses(model) == before  # also of those that were pinned meanwhile


def test_pinned_memory_takes_the_place_of_what_was_there():
    """One block at a time, and not again at the next call."""
    taken = []

    class Counting(RecordingDevice):
        def allocate_host(self, nbytes):
            taken.append(nbytes)
            return super().allocate_host(nbytes)

    model = make_pipe().transformer
    offloader = alone(model, Counting(), streamed(1, 2, "pinned"))
    for _ in range(3):
        velocity(model)
        offloader.offload_transient()
    assert len(taken) == LAYERS + 1
    for block in model.blocks:
        homes = {p.untyped_storage().data_ptr() for p in block.parameters()}
        assert len(homes) == 1  # its slab
    assert sum(taken) == device_bytes(model, ON_DEMAND)


def test_an_edit_after_settling_outlives_the_file(tmp_path):
    model, _ = mapped_model(tmp_path)
    offloader = alone(model, RecordingDevice(), streamed(0, 2, "pinned"))
    velocity(model)
    offloader.offload_all()
    with torch.no_grad():
        model.blocks[2].attn1.to_q.weight.mul_(3)
    expected = model.blocks[2].attn1.to_q.weight.clone()
    offloader.detach()
    assert torch.equal(model.blocks[2].attn1.to_q.weight, expected)


def test_the_thread_ends_with_the_offloader():
    model, before = make_pipe().transformer, threading.active_count()
    offloader = alone(model, RecordingDevice(), streamed())
    velocity(model)
    assert threading.active_count() == before + 1
    offloader.detach()
    assert threading.active_count() == before
