"""Models come and go: the same videos, in the memory that was promised, and no trace afterwards."""

import copy
import gc
import itertools
import weakref

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accel.offload.offloaders import (
    DEVICES,
    FORMS,
    NAMES,
    ON_DEMAND,
    addresses,
    make_device,
    make_pipe,
    models_of,
    offload,
    plain,
    streamed,
    video,
)
from tests.accel.offload.recording import RecordingDevice
from tests.builders import load_pipeline
from wan22.accel.offload.layout import Placement, device_bytes
from wan22.accel.offload.offloader import ModelOffloader, OffloadHook, free
from wan22.accel.quantize import quantize

RESIDENT, HOST = Placement("resident"), Placement("host")
PLANS = {
    "on_demand": {},
    "on demand, pinned": {"default": Placement("on_demand", source="pinned")},
    "resident": {"default": RESIDENT},
    "text on the host": {"text_encoder": HOST},
    "everything on the host": {"default": HOST},
    "streamed": {name: streamed() for name in ("text_encoder", "transformer", "transformer_2")},
    "streamed, three buffers": {name: streamed(1, 3) for name in ("transformer", "transformer_2")},
    "streamed, pinned": {name: streamed(2, 2, "pinned") for name in ("transformer", "transformer_2")},
    "one resident, one streamed": {"transformer": RESIDENT, "transformer_2": streamed(0, 3, "pinned")},
}


def predicted(pipe, offloader):
    """The most bytes at a time: whoever is there beside the residents."""
    sizes = {n: device_bytes(model, placement) for n, (model, placement) in offloader.models.items()}
    stay = {n for n, (_, placement) in offloader.models.items() if placement.kind == "resident"}
    return sum(sizes[n] for n in stay) + max((sizes[n] for n in sizes.keys() - stay), default=0)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_makes_the_same_video(plan, kind):
    pipe, device = make_pipe(), make_device(kind)
    offloader = offload(pipe, device, **PLANS[plan])
    expected = plain("t2v", "recording" if plan == "everything on the host" else kind)
    for _ in range(2):
        assert torch.equal(video(pipe).cpu(), expected)
    offloader.offload_transient()
    offloader.offload_all()
    assert offloader.on_device == ()
    offloader.detach()
    assert torch.equal(video(pipe).cpu(), plain("t2v"))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint(form, kind):
    pipe, device = make_pipe(form), make_device(kind)
    names = models_of(pipe).keys() - {"vae", "image_encoder"}
    offload(pipe, device, **{name: streamed(1) for name in names})
    assert torch.equal(video(pipe).cpu(), plain(form, kind))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_peak_bytes_are_those_predicted(plan, form):
    pipe, device = make_pipe(form), RecordingDevice()
    plan = {n: p for n, p in PLANS[plan].items() if n == "default" or hasattr(pipe, n)}
    offloader = offload(pipe, device, **plan)
    video(pipe)
    assert device.peak == predicted(pipe, offloader)
    offloader.offload_all()
    assert device.resident == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("placement", [ON_DEMAND, streamed(1), streamed(0, 3, "pinned")])
def test_bytes_on_a_gpu_are_those_predicted(placement):
    model = make_pipe().transformer
    offloader = ModelOffloader({"transformer": (model, placement)}, make_device("cuda"))
    offloader.attach()
    before = torch.cuda.memory_allocated()
    offloader.onload("transformer")
    assert torch.cuda.memory_allocated() - before == device_bytes(model, placement)
    offloader.offload_transient()
    assert torch.cuda.memory_allocated() == before


def test_who_is_there_and_when():
    pipe, device = make_pipe("i2v-2.1"), RecordingDevice()
    offloader, turns = offload(pipe, device, image_encoder=RESIDENT), []
    onload = offloader.onload

    def record(name):
        onload(name)
        if not turns or turns[-1] != (name, offloader.on_device):
            turns.append((name, offloader.on_device))

    offloader.onload = record
    video(pipe)
    assert turns == [
        ("text_encoder", ("text_encoder",)),
        ("image_encoder", ("image_encoder",)),
        ("vae", ("image_encoder", "vae")),
        ("transformer", ("image_encoder", "transformer")),
        ("vae", ("image_encoder", "vae")),
    ]


def test_what_leaves_is_gone_before_what_comes_takes_memory():
    pipe, device = make_pipe(), RecordingDevice()
    offload(pipe, device)
    video(pipe)
    models, here = 0, 0
    for record in device.records:
        models += record.kind == "allocate" and here == 0
        here += (record.kind == "allocate") - (record.kind == "free")
    assert models == 4  # each began on an empty device


def test_a_later_generation_copies_no_more_and_keeps_no_more():
    pipe, device = make_pipe(), RecordingDevice()
    offloader = offload(pipe, device, transformer=streamed(1, 2, "pinned"), transformer_2=RESIDENT)
    copied, kept = [0], []
    for _ in range(20):
        video(pipe, num_inference_steps=2, output_type="latent")
        offloader.offload_transient()
        copied.append(device.copied())
        kept.append(device.resident)
    first, *later = [b - a for a, b in itertools.pairwise(copied)]
    assert set(later) == {first - device_bytes(pipe.transformer_2, RESIDENT)}
    assert set(kept) == {device_bytes(pipe.transformer_2, RESIDENT)}
    assert device.peak == device_bytes(pipe.transformer_2, RESIDENT) + max(
        device_bytes(pipe.transformer, streamed(1)), device_bytes(pipe.text_encoder, ON_DEMAND)
    )


class Copies(TorchDispatchMode):
    """Counts copies to the host."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("copy_", "_to_copy", "clone", "_copy_from"):
            stand_in = isinstance(self.device, RecordingDevice)
            self.count += not (self.device.holds(result) if stand_in else result.is_cuda)
        return result


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", ["mmap", "pinned"])
def test_leaving_copies_nothing(source, kind):
    pipe, device = make_pipe(), make_device(kind)
    offloader = offload(pipe, device, transformer_2=streamed(1, 2, source), vae=RESIDENT)
    for leave in (offloader.offload_transient, offloader.offload_all, offloader.detach):
        video(pipe, output_type="latent")
        assert "transformer_2" in offloader.on_device
        with Copies(device) as copies:
            leave()
        assert copies.count == 0


@pytest.mark.parametrize("kind", DEVICES)
def test_detached_models_are_as_before(kind):
    pipe = make_pipe()
    video(pipe)  # diffusers adds attributes of its own to models that run
    before = {name: (addresses(model), set(vars(model))) for name, model in models_of(pipe).items()}
    hooks = [len(block._forward_pre_hooks) for block in pipe.transformer.blocks]
    tensors = {name: [id(p) for p in model.parameters()] for name, model in models_of(pipe).items()}
    offloader = offload(pipe, make_device(kind), transformer=streamed(2), transformer_2=RESIDENT)
    video(pipe)
    offloader.detach()
    for name, model in models_of(pipe).items():
        assert (addresses(model), set(vars(model))) == before[name]
        assert [id(p) for p in model.parameters()] == tensors[name]
        assert all(p.device.type == "cpu" for p in model.parameters())
    assert [len(block._forward_pre_hooks) for block in pipe.transformer.blocks] == hooks
    assert torch.equal(video(pipe), plain("t2v"))
    assert torch.equal(video(copy.deepcopy(pipe)), plain("t2v"))


def test_attached_again_with_another_plan():
    pipe = make_pipe()
    for plan in (streamed(source="pinned"), ON_DEMAND, streamed(2, 3)):
        offloader = offload(pipe, RecordingDevice(), transformer=plan)
        assert torch.equal(video(pipe), plain("t2v"))
        offloader.detach()
        offloader.attach()
        assert torch.equal(video(pipe), plain("t2v"))
        offloader.detach()


# ---- the next expert, while this one runs ----


def prefetching(pipe, offloader, step=0):
    """Ask for the second expert after a step; return what was answered."""
    answers = []

    def callback(pipe, index, timestep, tensors):
        if index == step:
            answers.append(offloader.prefetch("transformer_2"))
        return {}

    return video(pipe, callback_on_step_end=callback), answers


@pytest.mark.parametrize("kind", DEVICES)
def test_the_next_expert_is_fetched_while_there_is_room(kind):
    pipe, device = make_pipe(), make_device(kind)
    offloader = offload(pipe, device, transformer_2=streamed(1))
    frames, answers = prefetching(pipe, offloader)
    assert answers == [True]
    assert torch.equal(frames.cpu(), plain("t2v", kind))
    if kind == "recording":
        sizes = [device_bytes(pipe.transformer, ON_DEMAND), device_bytes(pipe.transformer_2, streamed(1))]
        assert device.peak == max(sum(sizes), device_bytes(pipe.vae, ON_DEMAND))


def test_the_next_expert_stays_where_it_is_without_room_or_while_the_way_is_taken():
    pipe = make_pipe()
    need = device_bytes(pipe.transformer, ON_DEMAND)
    device = RecordingDevice(capacity=max(2 * need - 1, device_bytes(pipe.vae, ON_DEMAND)))
    offloader = offload(pipe, device)
    frames, answers = prefetching(pipe, offloader)
    assert answers == [False]
    assert torch.equal(frames, plain("t2v"))
    offloader.detach()
    device = RecordingDevice()
    device.free_bytes = lambda: need - 1  # memory that is kept for what runs
    offloader = offload(pipe, device)
    assert prefetching(pipe, offloader)[1] == [False]
    assert device.peak == max(need, device_bytes(pipe.vae, ON_DEMAND))
    offloader.detach()
    offloader = offload(pipe, RecordingDevice(), transformer=streamed())
    assert prefetching(pipe, offloader)[1] == [False]


def test_a_model_that_was_fetched_in_vain_leaves():
    pipe, device = make_pipe(), RecordingDevice()
    offloader = offload(pipe, device)
    offloader.onload("transformer")
    assert offloader.prefetch("transformer_2")
    assert offloader.prefetch("transformer_2")
    assert offloader.on_device == ("transformer", "transformer_2")
    offloader.onload("vae")
    assert offloader.on_device == ("vae",)
    offloader.prefetch("transformer")
    offloader.offload_transient()
    assert (offloader.on_device, device.resident) == ((), 0)


# ---- what goes wrong ----


def test_a_model_that_does_not_fit_is_at_home():
    pipe = make_pipe()
    before = addresses(pipe.transformer)
    device = RecordingDevice(capacity=device_bytes(pipe.transformer, ON_DEMAND) - 1)
    offloader = offload(pipe, device, vae=HOST)
    with pytest.raises(torch.OutOfMemoryError):
        video(pipe)
    assert (offloader.on_device, device.resident, addresses(pipe.transformer)) == ((), 0, before)
    device.capacity += 1
    assert torch.equal(video(pipe), plain("t2v"))


@pytest.mark.parametrize("most", [0, 2])
def test_where_no_more_memory_is_pinned_the_rest_comes_from_where_it_is(most, caplog):
    class Unpinnable(RecordingDevice):
        pinned = 0

        def allocate_host(self, nbytes):
            self.pinned += 1
            if self.pinned > most:
                raise MemoryError("the system pins no more")
            return super().allocate_host(nbytes)

    pipe = make_pipe()
    offloader = offload(pipe, Unpinnable(), transformer=streamed(source="pinned"))
    assert torch.equal(video(pipe), plain("t2v"))
    warnings = [record.message for record in caplog.records if "pins no more" in record.message]
    assert len(warnings) == 1
    assert "a smaller ram= avoids it" in warnings[0]
    offloader.detach()
    assert torch.equal(video(pipe), plain("t2v"))


def test_models_that_somebody_else_moves_are_refused():
    pipe = make_pipe()
    offloader = offload(pipe, RecordingDevice())
    with pytest.raises(ValueError, match="text_encoder is already offloaded"):
        offload(pipe, RecordingDevice())
    with pytest.raises(ValueError, match="text_encoder is already offloaded"):
        offloader.attach()
    offloader.detach()
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"transformer is offloaded by accelerate \(CpuOffload\)"):
        offload(pipe, RecordingDevice())
    pipe = make_pipe()
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="vae is offloaded by accelerate"):
        offload(pipe, RecordingDevice())
    pipe = make_pipe()
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer_2, cpu, cpu, offload_type="leaf_level")
    with pytest.raises(ValueError, match="transformer_2 is offloaded in groups by diffusers"):
        offload(pipe, RecordingDevice())
    pipe = make_pipe()
    with pytest.raises(ValueError, match="transformer and transformer_2 are one model"):
        shared = {n: (pipe.transformer, ON_DEMAND) for n in ("transformer", "transformer_2")}
        ModelOffloader(shared, RecordingDevice())
    with pytest.raises(ValueError, match="transformer is compiled as a whole"):
        ModelOffloader({"transformer": (torch.compile(pipe.transformer), ON_DEMAND)}, RecordingDevice())
    with pytest.raises(ValueError, match=r"transformer has weights on meta.* call pipe\.to\('cpu'\) first"):
        ModelOffloader({"transformer": (pipe.transformer.to("meta"), ON_DEMAND)}, RecordingDevice())


def test_diffusers_may_take_the_hooks_away():
    pipe = make_pipe()
    before = addresses(pipe.transformer)
    offloader = offload(pipe, RecordingDevice(), transformer=streamed())
    video(pipe)
    pipe.remove_all_hooks()
    assert not offloader.attached
    assert not offloader.prefetch("transformer")
    assert not offloader.prefetch("vae")
    assert offloader.on_device == ()
    assert addresses(pipe.transformer) == before
    assert torch.equal(video(pipe), plain("t2v"))
    offloader.detach()


def test_diffusers_is_told_where_the_pipeline_runs():
    pipe = make_pipe()
    device = RecordingDevice()
    device.torch_device = torch.device("meta")  # one that can be told from the host
    offloader = offload(pipe, device, text_encoder=HOST)
    assert pipe._execution_device.type == "meta"
    assert OffloadHook(offloader, "text_encoder", None).execution_device is None
    offloader.detach()
    assert pipe._execution_device.type == "cpu"


def test_edits_between_calls_count():
    pipe = make_pipe()
    offloader = offload(pipe, RecordingDevice(), transformer=streamed(1, 2, "pinned"), transformer_2=RESIDENT)
    video(pipe)
    offloader.offload_all()
    other = make_pipe()
    with torch.no_grad():
        for edited in (pipe, other):
            for model in (edited.transformer, edited.transformer_2):
                model.blocks[1].attn1.to_q.weight.add_(0.1)  # in place
                model.blocks[0].attn1.to_k.weight.data = model.blocks[0].attn1.to_k.weight * 2  # elsewhere
                model.to(torch.float64)
    expected = video(other)
    assert not torch.equal(expected, plain("t2v"))
    assert torch.equal(video(pipe), expected)
    offloader.detach()
    assert torch.equal(video(pipe), expected)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("source", ["mmap", "pinned"])
def test_models_are_saved_wherever_they_are(source, kind, tmp_path):
    pipe = make_pipe()
    everywhere = {
        "transformer": streamed(1, 2, source),
        "transformer_2": Placement("resident", source=source),
    }
    offloader = offload(pipe, make_device(kind), **everywhere)
    video(pipe, output_type="latent")
    assert offloader.on_device == ("transformer_2",)
    pipe.save_pretrained(tmp_path, max_shard_size="200KB")
    assert torch.equal(video(load_pipeline(tmp_path)), plain("t2v"))


@pytest.mark.parametrize("placement", [ON_DEMAND, streamed(1, 2, "pinned")])
def test_weights_that_were_replaced_are_let_go(placement):
    pipe = make_pipe()
    offloader = offload(pipe, RecordingDevice(), transformer=placement)
    video(pipe)
    offloader.offload_all()
    old = [weakref.ref(block.ffn.net[2].weight) for block in pipe.transformer.blocks]
    quantize(pipe.transformer, "int8")
    if placement.source == "pinned":  # others are let go at once
        offloader.offload_all()
    gc.collect()
    assert [weight() for weight in old] == [None] * len(old)
    video(pipe)
    offloader.offload_all()
    assert torch.equal(video(pipe), video(pipe))


def test_the_device_is_trimmed_at_the_end():
    device, trimmed = RecordingDevice(), []
    offloader = offload(make_pipe(), device)
    device.trim = lambda: trimmed.append(1)
    offloader.detach()
    assert trimmed


def test_memory_goes_back_to_the_system():
    pipe = make_pipe()
    free()
    assert torch.equal(video(pipe), plain("t2v"))
    free(models_of(pipe).values())
    assert all(p.is_meta for name in NAMES if hasattr(pipe, name) for p in getattr(pipe, name).parameters())


@pytest.mark.parametrize("source", ["mmap", "pinned"])
@pytest.mark.parametrize("kind", ["resident", "on_demand", "streamed"])
def test_a_copy_that_fails_is_made_anew_by_the_next_call(kind, source):
    class Failing(RecordingDevice):
        left = -1

        def copy(self, buffer, source, after):
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
            return super().copy(buffer, source, after)

    pipe, device = make_pipe(), Failing()
    offloader = offload(pipe, device, transformer=Placement(kind, source=source))
    for left in (3, 30):
        device.left = left
        with pytest.raises(
            RuntimeError, match=r"^the weights \w+\.\w+ could not be copied: CUDA error: un.*ure$"
        ):
            video(pipe)
        assert torch.equal(video(pipe), plain("t2v"))
        offloader.offload_all()
