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

from tests.accel.offload.recording import RecordingDevice
from tests.accel.offload.residences import (
    DEVICES,
    FORMS,
    NAMES,
    VISITING,
    addresses,
    make_device,
    make_pipe,
    models_of,
    plain,
    reside,
    streamed,
    video,
)
from tests.builders import load_pipeline
from wan22.accel.offload.layout import Placement, device_bytes
from wan22.accel.offload.residence import Residence, _Turn, free
from wan22.accel.quantize import quantize

RESIDENT, HOST = Placement("resident"), Placement("host")
PLANS = {
    "visiting": {},
    "visiting, pinned": {"default": Placement("visiting", home="pinned")},
    "resident": {"default": RESIDENT},
    "text on the host": {"text_encoder": HOST},
    "everything on the host": {"default": HOST},
    "streamed": {name: streamed() for name in ("text_encoder", "transformer", "transformer_2")},
    "streamed, three slots": {name: streamed(1, 3) for name in ("transformer", "transformer_2")},
    "streamed, pinned": {name: streamed(2, 2, "pinned") for name in ("transformer", "transformer_2")},
    "one resident, one streamed": {"transformer": RESIDENT, "transformer_2": streamed(0, 3, "pinned")},
}


def predicted(pipe, residence):
    """The most bytes at a time: whoever is there beside the residents."""
    sizes = {n: device_bytes(model, placement) for n, (model, placement) in residence.models.items()}
    stay = {n for n, (_, placement) in residence.models.items() if placement.kind == "resident"}
    return sum(sizes[n] for n in stay) + max((sizes[n] for n in sizes.keys() - stay), default=0)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_makes_the_same_video(plan, kind):
    pipe, device = make_pipe(), make_device(kind)
    residence = reside(pipe, device, **PLANS[plan])
    expected = plain("t2v", "recording" if plan == "everything on the host" else kind)
    for _ in range(2):
        assert torch.equal(video(pipe).cpu(), expected)
    residence.leave_all()
    residence.settle()
    assert residence.here == ()
    residence.detach()
    assert torch.equal(video(pipe).cpu(), plain("t2v"))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint(form, kind):
    pipe, device = make_pipe(form), make_device(kind)
    names = models_of(pipe).keys() - {"vae", "image_encoder"}
    reside(pipe, device, **{name: streamed(1) for name in names})
    assert torch.equal(video(pipe).cpu(), plain(form, kind))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_peak_bytes_are_those_predicted(plan, form):
    pipe, device = make_pipe(form), RecordingDevice()
    plan = {n: p for n, p in PLANS[plan].items() if n == "default" or hasattr(pipe, n)}
    residence = reside(pipe, device, **plan)
    video(pipe)
    assert device.peak == predicted(pipe, residence)
    residence.settle()
    assert device.resident == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("placement", [VISITING, streamed(1), streamed(0, 3, "pinned")])
def test_bytes_on_a_gpu_are_those_predicted(placement):
    model = make_pipe().transformer
    residence = Residence({"transformer": (model, placement)}, make_device("cuda"))
    residence.attach()
    before = torch.cuda.memory_allocated()
    residence.enter("transformer")
    assert torch.cuda.memory_allocated() - before == device_bytes(model, placement)
    residence.leave_all()
    assert torch.cuda.memory_allocated() == before


def test_who_is_there_and_when():
    pipe, device = make_pipe("i2v-2.1"), RecordingDevice()
    residence, turns = reside(pipe, device, image_encoder=RESIDENT), []
    enter = residence.enter

    def record(name):
        enter(name)
        if not turns or turns[-1] != (name, residence.here):
            turns.append((name, residence.here))

    residence.enter = record
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
    reside(pipe, device)
    video(pipe)
    models, here = 0, 0
    for record in device.records:
        models += record.kind == "allocate" and here == 0
        here += (record.kind == "allocate") - (record.kind == "free")
    assert models == 4  # each began on an empty device


def test_a_later_generation_copies_no_more_and_keeps_no_more():
    pipe, device = make_pipe(), RecordingDevice()
    residence = reside(pipe, device, transformer=streamed(1, 2, "pinned"), transformer_2=RESIDENT)
    copied, kept = [0], []
    for _ in range(20):
        video(pipe, num_inference_steps=2, output_type="latent")
        residence.leave_all()
        copied.append(device.copied())
        kept.append(device.resident)
    first, *later = [b - a for a, b in itertools.pairwise(copied)]
    assert set(later) == {first - device_bytes(pipe.transformer_2, RESIDENT)}
    assert set(kept) == {device_bytes(pipe.transformer_2, RESIDENT)}
    assert device.peak == device_bytes(pipe.transformer_2, RESIDENT) + max(
        device_bytes(pipe.transformer, streamed(1)), device_bytes(pipe.text_encoder, VISITING)
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
@pytest.mark.parametrize("home", ["mapped", "pinned"])
def test_leaving_copies_nothing(home, kind):
    pipe, device = make_pipe(), make_device(kind)
    residence = reside(pipe, device, transformer_2=streamed(1, 2, home), vae=RESIDENT)
    for leave in (residence.leave_all, residence.settle, residence.detach):
        video(pipe, output_type="latent")
        assert "transformer_2" in residence.here
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
    residence = reside(pipe, make_device(kind), transformer=streamed(2), transformer_2=RESIDENT)
    video(pipe)
    residence.detach()
    for name, model in models_of(pipe).items():
        assert (addresses(model), set(vars(model))) == before[name]
        assert [id(p) for p in model.parameters()] == tensors[name]
        assert all(p.device.type == "cpu" for p in model.parameters())
    assert [len(block._forward_pre_hooks) for block in pipe.transformer.blocks] == hooks
    assert torch.equal(video(pipe), plain("t2v"))
    assert torch.equal(video(copy.deepcopy(pipe)), plain("t2v"))


def test_attached_again_with_another_plan():
    pipe = make_pipe()
    for plan in (streamed(home="pinned"), VISITING, streamed(2, 3)):
        residence = reside(pipe, RecordingDevice(), transformer=plan)
        assert torch.equal(video(pipe), plain("t2v"))
        residence.detach()
        residence.attach()
        assert torch.equal(video(pipe), plain("t2v"))
        residence.detach()


# ---- the next expert, while this one runs ----


def prefetching(pipe, residence, step=0):
    """Ask for the second expert after a step; return what was answered."""
    answers = []

    def callback(pipe, index, timestep, tensors):
        if index == step:
            answers.append(residence.prefetch("transformer_2"))
        return {}

    return video(pipe, callback_on_step_end=callback), answers


@pytest.mark.parametrize("kind", DEVICES)
def test_the_next_expert_is_fetched_while_there_is_room(kind):
    pipe, device = make_pipe(), make_device(kind)
    residence = reside(pipe, device, transformer_2=streamed(1))
    frames, answers = prefetching(pipe, residence)
    assert answers == [True]
    assert torch.equal(frames.cpu(), plain("t2v", kind))
    if kind == "recording":
        sizes = [device_bytes(pipe.transformer, VISITING), device_bytes(pipe.transformer_2, streamed(1))]
        assert device.peak == max(sum(sizes), device_bytes(pipe.vae, VISITING))


def test_the_next_expert_stays_where_it_is_without_room_or_while_the_way_is_taken():
    pipe = make_pipe()
    need = device_bytes(pipe.transformer, VISITING)
    device = RecordingDevice(capacity=max(2 * need - 1, device_bytes(pipe.vae, VISITING)))
    residence = reside(pipe, device)
    frames, answers = prefetching(pipe, residence)
    assert answers == [False]
    assert torch.equal(frames, plain("t2v"))
    residence.detach()
    device = RecordingDevice()
    device.free_bytes = lambda: need - 1  # memory that is kept for what runs
    residence = reside(pipe, device)
    assert prefetching(pipe, residence)[1] == [False]
    assert device.peak == max(need, device_bytes(pipe.vae, VISITING))
    residence.detach()
    residence = reside(pipe, RecordingDevice(), transformer=streamed())
    assert prefetching(pipe, residence)[1] == [False]


def test_a_model_that_was_fetched_in_vain_leaves():
    pipe, device = make_pipe(), RecordingDevice()
    residence = reside(pipe, device)
    residence.enter("transformer")
    assert residence.prefetch("transformer_2")
    assert residence.prefetch("transformer_2")
    assert residence.here == ("transformer", "transformer_2")
    residence.enter("vae")
    assert residence.here == ("vae",)
    residence.prefetch("transformer")
    residence.leave_all()
    assert (residence.here, device.resident) == ((), 0)


# ---- what goes wrong ----


def test_a_model_that_does_not_fit_is_at_home():
    pipe = make_pipe()
    before = addresses(pipe.transformer)
    device = RecordingDevice(capacity=device_bytes(pipe.transformer, VISITING) - 1)
    residence = reside(pipe, device, vae=HOST)
    with pytest.raises(torch.OutOfMemoryError):
        video(pipe)
    assert (residence.here, device.resident, addresses(pipe.transformer)) == ((), 0, before)
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
    residence = reside(pipe, Unpinnable(), transformer=streamed(home="pinned"))
    assert torch.equal(video(pipe), plain("t2v"))
    warnings = [record.message for record in caplog.records if "pins no more" in record.message]
    assert len(warnings) == 1
    assert "a smaller ram= avoids it" in warnings[0]
    residence.detach()
    assert torch.equal(video(pipe), plain("t2v"))


def test_models_that_somebody_else_moves_are_refused():
    pipe = make_pipe()
    residence = reside(pipe, RecordingDevice())
    with pytest.raises(ValueError, match="text_encoder is in a residence already"):
        reside(pipe, RecordingDevice())
    with pytest.raises(ValueError, match="text_encoder is in a residence already"):
        residence.attach()
    residence.detach()
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"transformer is offloaded by accelerate \(CpuOffload\)"):
        reside(pipe, RecordingDevice())
    pipe = make_pipe()
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="vae is offloaded by accelerate"):
        reside(pipe, RecordingDevice())
    pipe = make_pipe()
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer_2, cpu, cpu, offload_type="leaf_level")
    with pytest.raises(ValueError, match="transformer_2 is offloaded in groups by diffusers"):
        reside(pipe, RecordingDevice())
    pipe = make_pipe()
    with pytest.raises(ValueError, match="transformer and transformer_2 are one model"):
        reside_shared = {n: (pipe.transformer, VISITING) for n in ("transformer", "transformer_2")}
        Residence(reside_shared, RecordingDevice())
    with pytest.raises(ValueError, match="transformer is compiled as a whole"):
        Residence({"transformer": (torch.compile(pipe.transformer), VISITING)}, RecordingDevice())
    with pytest.raises(ValueError, match=r"transformer has weights on meta.* call pipe\.to\('cpu'\) first"):
        Residence({"transformer": (pipe.transformer.to("meta"), VISITING)}, RecordingDevice())


def test_diffusers_may_take_the_hooks_away():
    pipe = make_pipe()
    before = addresses(pipe.transformer)
    residence = reside(pipe, RecordingDevice(), transformer=streamed())
    video(pipe)
    pipe.remove_all_hooks()
    assert not residence.attached
    assert not residence.prefetch("transformer")
    assert not residence.prefetch("vae")
    assert residence.here == ()
    assert addresses(pipe.transformer) == before
    assert torch.equal(video(pipe), plain("t2v"))
    residence.detach()


def test_diffusers_is_told_where_the_pipeline_runs():
    pipe = make_pipe()
    device = RecordingDevice()
    device.torch_device = torch.device("meta")  # one that can be told from the host
    residence = reside(pipe, device, text_encoder=HOST)
    assert pipe._execution_device.type == "meta"
    assert _Turn(residence, "text_encoder", None).execution_device is None
    residence.detach()
    assert pipe._execution_device.type == "cpu"


def test_edits_between_calls_count():
    pipe = make_pipe()
    residence = reside(pipe, RecordingDevice(), transformer=streamed(1, 2, "pinned"), transformer_2=RESIDENT)
    video(pipe)
    residence.settle()
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
    residence.detach()
    assert torch.equal(video(pipe), expected)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("home", ["mapped", "pinned"])
def test_models_are_saved_wherever_they_are(home, kind, tmp_path):
    pipe = make_pipe()
    everywhere = {"transformer": streamed(1, 2, home), "transformer_2": Placement("resident", home=home)}
    residence = reside(pipe, make_device(kind), **everywhere)
    video(pipe, output_type="latent")
    assert residence.here == ("transformer_2",)
    pipe.save_pretrained(tmp_path, max_shard_size="200KB")
    assert torch.equal(video(load_pipeline(tmp_path)), plain("t2v"))


@pytest.mark.parametrize("placement", [VISITING, streamed(1, 2, "pinned")])
def test_weights_that_were_replaced_are_let_go(placement):
    pipe = make_pipe()
    residence = reside(pipe, RecordingDevice(), transformer=placement)
    video(pipe)
    residence.settle()
    old = [weakref.ref(block.ffn.net[2].weight) for block in pipe.transformer.blocks]
    quantize(pipe.transformer, "int8")
    if placement.home == "pinned":  # others are let go at once
        residence.settle()
    gc.collect()
    assert [weight() for weight in old] == [None] * len(old)
    video(pipe)
    residence.settle()
    assert torch.equal(video(pipe), video(pipe))


def test_the_device_is_trimmed_at_the_end():
    device, trimmed = RecordingDevice(), []
    residence = reside(make_pipe(), device)
    device.trim = lambda: trimmed.append(1)
    residence.detach()
    assert trimmed


def test_memory_goes_back_to_the_system():
    pipe = make_pipe()
    free()
    assert torch.equal(video(pipe), plain("t2v"))
    free(models_of(pipe).values())
    assert all(p.is_meta for name in NAMES if hasattr(pipe, name) for p in getattr(pipe, name).parameters())
