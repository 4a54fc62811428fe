"""Whole calls on a pretended card: the CPU's frames, and the host waits for nothing but what is listed."""

from collections import Counter
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints.lora_writers import make_lora, save
from tests.fake_card import CardTensor, FakeCard
from tests.golden_data import relative_error
from wan22 import WanI2VPipeline, WanT2VPipeline, tiny_checkpoint
from wan22.accel import attention
from wan22.accel.offload.layout import Placement
from wan22.accel.planning import machine, planner
from wan22.accel.planning.machine import Machine
from wan22.accel.planning.plans import Phase, Plan
from wan22.accel.quantization import dynamic_float8
from wan22.guidance import ClassifierFreeGuidance, Gated, SkipLayer
from wan22.pipelines.call.guidance.named import GUIDERS
from wan22.video.result import to_uint8

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

STEPS, CHUNKS = 2, 2  # of 5 frames, the VAE decodes 1 and 4
KINDS = {
    "t2v": (WanT2VPipeline, {}),
    "i2v": (WanI2VPipeline, {"image": np.linspace(0, 1, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)}),
    "ti2v": (WanI2VPipeline, {"image": np.full((32, 32, 3), 90, np.uint8)}),
}

# Why the host waits while a video is sampled, and how often.
SAMPLING = {
    # Whether each step's latents are finite: after the next step, and of the last one at the end.
    "event in devices.py:_next": STEPS,
}
# The same in a process's first call.
ONCE = {
    # Which of PyTorch's float8 products give the right number.
    "fp8_dynamic": {"reads a number in accel/quantization/dynamic_float8.py:_tried_form": 1},
}
# The same while it is decoded.
DECODING = {
    # Each chunk of frames: while the next one is decoded, and the last one at the end.
    "event in devices.py:_next": CHUNKS,
}


def load(kind, dtype=torch.float32):
    pipe = KINDS[kind][0].from_pretrained(tiny_checkpoint(kind), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(kind, **others):
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "seed": 3}
    return {"prompt": "a red circle moves to the right", **KINDS[kind][1], **size, **others}


@contextmanager
def dtypes_of(pipe):
    """Record the dtypes of all modules' results in a list."""
    found, handles = [], []

    def hook(name):
        def record(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor):
                found.append((name, out.dtype))

        return record

    for slot in ("text_encoder", "transformer", "transformer_2", "vae"):
        for name, module in (getattr(pipe, slot, None) or torch.nn.Module()).named_modules():
            handles.append(module.register_forward_hook(hook(f"{slot}.{name}")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_waits(card, decoding, **more):
    """Compare what made the host wait with the lists: it waits for one while the next computes."""
    for part, known in (("denoise", SAMPLING | more), (decoding, DECODING)):
        assert told(card.waits(part)) == known
        idle = [wait.idle for wait in card.waits(part) if wait.kind == "event"]
        assert idle == [False] * (len(idle) - 1) + [True]


def told(waits):
    return Counter(f"{wait.kind} in {wait.where}" for wait in waits)


def change(pipe, how, folder):
    """Accelerate, quantise or adapt a pipeline."""
    if how == "accelerated":
        pipe.accelerate()
    elif how == "lora":
        pipe.load_lora_weights(
            save(make_lora(pipe.transformer, 5), folder / "lora.safetensors"), strength=0.5
        )
    elif how != "plain":
        pipe.quantize(how)


@pytest.fixture(autouse=True)
def nothing_is_known_of_the_card():
    """Forget which kernels were tried, here and after."""
    for found in (kernels := (attention.failure, dynamic_float8._tried_form)):
        found.cache_clear()
    yield
    for found in kernels:
        found.cache_clear()


CALLS = [("t2v", how) for how in ("plain", "accelerated", "int8", "fp8", "fp8_dynamic", "lora")]
CALLS += [("i2v", "plain"), ("ti2v", "plain")]


@cache
def on_cpu(kind, how="plain", folder=None):
    pipe = load(kind)
    change(pipe, how, folder)
    return pipe(**arguments(kind)).frames


@pytest.mark.parametrize(("kind", "how"), CALLS)
def test_a_call_on_the_card_makes_the_cpus_frames(kind, how, tmp_path):
    expected = on_cpu(kind, how, tmp_path if how == "lora" else None)
    with FakeCard() as card:
        pipe = load(kind).to("cuda")
        change(pipe, how, tmp_path)
        assert all(isinstance(p, CardTensor) for p in pipe.transformer.parameters())
        assert np.array_equal(pipe(**arguments(kind)).frames, expected)
    check_waits(card, "decode", **ONCE.get(how, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_on_the_card(kind):
    """Each module computes in the dtype that it has on the CPU; kernels of the card may round otherwise."""
    with dtypes_of(pipe := load(kind, "auto")) as expected_dtypes:
        expected = pipe(**arguments(kind)).frames
    with FakeCard() as card, dtypes_of(pipe := load(kind, "auto").to("cuda")) as dtypes:
        found = pipe(**arguments(kind)).frames
    check_waits(card, "decode")
    assert dtypes == expected_dtypes
    assert torch.bfloat16 in {dtype for _, dtype in dtypes}
    assert relative_error(torch.from_numpy(found), torch.from_numpy(expected)) <= 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_on_the_card_has_the_cpus_frames(kind, tmp_path):
    expected = to_uint8(on_cpu(kind)[0])
    with FakeCard() as card:
        pipe = load(kind).to("cuda")
        found = list(pipe.stream(**arguments(kind)))
        assert np.array_equal(found, expected)
        check_waits(card, "stream_frames")
        assert card.downloads[-2 * CHUNKS :] == [torch.uint8, torch.bool] * CHUNKS
        files = pipe.stream(**arguments(kind)).save(tmp_path / "frames.png")
    assert [np.array(Image.open(file)).tolist() for file in files] == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frames_after_an_image_are_made_on_the_card_and_not_compared(dtype):
    with FakeCard() as card:
        load("i2v", dtype).to("cuda")(**arguments("i2v", num_frames=17, output_type="latent"))
    assert told(card.waits("make_condition")) == {
        "upload in pipelines/call/autoencoders.py:<genexpr>": 1,  # the image, and not the 16 frames after it
        "reads a number in pipelines/call/autoencoders.py:encode": 1,  # whether the latents are finite
    }


@pytest.mark.parametrize(("slot", "step"), [("transformer", 1), ("transformer_2", STEPS)])
def test_numbers_that_are_not_finite_name_their_step(slot, step):
    with FakeCard():
        pipe = load("t2v").to("cuda")
        with torch.no_grad():
            getattr(pipe, slot).proj_out.weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match=rf"after step {step} of {STEPS} .*pipe\.{slot} in"):
            pipe(**arguments("t2v"))


def test_frames_that_are_not_finite():
    with FakeCard():
        pipe = load("t2v").to("cuda")
        with torch.no_grad():
            pipe.vae.decoder.conv_in.weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="VAE's frames are not finite"):
            pipe(**arguments("t2v"))


def planned(pipe, source, strips):
    """Return a plan whose transformers pass through buffers; the other models come when they are called."""
    streamed, called = Placement("streamed", source=source), Placement("on_demand")
    placements = {"text_encoder": called, "transformer": streamed, "transformer_2": streamed, "vae": called}
    machine, phases = Machine(torch.device("cuda"), 1e9, 1e9), (Phase("text", 0, 0),)
    how = {"strips": strips, "token_chunks": 1, "in_turn": False, "prefetch": False, "quantize": None}
    return Plan("tiny", (32, 32, 5), machine, placements, **how, phases=phases, host=0, pinned=0, mapped=0)


@pytest.mark.parametrize(("source", "strips"), [("pinned", None), ("mmap", 2)])
def test_a_planned_call_makes_the_cpus_frames(source, strips):
    expected = on_cpu("t2v")
    with FakeCard() as card:
        pipe = load("t2v")
        pipe.apply(planned(pipe, source, strips))
        for _ in range(2):  # the second one's weights are pinned already
            card.recorded.clear()
            assert np.array_equal(pipe(**arguments("t2v")).frames, expected)
            for part, known in (("denoise", SAMPLING), ("decode", DECODING)):
                # Where another model comes, copies of the one before end before its memory is given away.
                waits = [w for w in card.waits(part) if w.where != "accel/offload/devices.py:finish"]
                assert told(waits) == known
        pipe.release()
        assert not any(isinstance(p, CardTensor) for p in pipe.transformer.parameters())


@pytest.fixture
def rates(monkeypatch):
    """Rates of the card, which it has not, and no memory of libraries, which a miniature is small beside."""
    for name in ("measured_flops", "measured_bandwidth", "measured_pinning"):
        monkeypatch.setattr(machine, name, lambda device: 1e12)
    monkeypatch.setattr(planner, "WORKSPACE", 0)


# Where the text encoder, the transformers and the VAE are, and the strips that the VAE decodes in.
BUDGETS = {
    "auto": ("resident", "resident", "resident", None),
    30e6: ("host", "resident", "on_demand", None),
    20e6: ("on_demand", "on_demand", "on_demand", None),
    9e6: ("host", "on_demand", "on_demand", 2),
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_call_within_a_budget_makes_the_cpus_frames(rates, budget):
    expected = on_cpu("t2v")
    with FakeCard() as card:
        memory = "auto" if budget == "auto" else machine.CONTEXT + budget
        pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"), dtype=torch.float32, memory=memory)
        pipe.set_progress_bar_config(disable=True)
        for _ in range(2):  # the first one plans
            card.recorded.clear()
            assert np.array_equal(pipe(**arguments("t2v")).frames, expected)
        plan = pipe.memory_plan
        kinds = (plan.placements[slot].kind for slot in ("text_encoder", "transformer", "vae"))
        assert (*kinds, plan.strips) == BUDGETS[budget]
        for part, known in (("denoise", SAMPLING), ("decode", DECODING)):
            # Where another model comes, copies of the one before end before its memory is given away.
            waits = [w for w in card.waits(part) if w.where != "accel/offload/devices.py:finish"]
            assert told(waits) == known
        pipe.release()
        assert not any(isinstance(p, CardTensor) for p in pipe.transformer.parameters())


def test_a_larger_video_is_planned_anew(rates):
    with FakeCard():
        pipe = load("t2v")
        small = pipe.fit(vram=machine.CONTEXT + 20e6, height=32, width=32, num_frames=5)
        large = arguments("t2v", height=64, width=64)
        assert pipe(**large).frames.shape[2:4] == (64, 64)
        assert pipe.memory_plan is not small
        assert pipe.memory_plan.size == (64, 64, 5)


def test_noise_that_the_card_draws_stays_there():
    with FakeCard() as card:
        pipe = load("t2v").to("cuda")
        found = pipe(**arguments("t2v", noise_device="cuda"))
        given = pipe(**arguments("t2v", seed=None, generator=torch.Generator("cuda").manual_seed(3)))
    assert found.recipe.call["noise_device"] == "cuda"
    assert not card.waits("draw_latents")
    # The pretended generator draws the CPU's numbers.
    assert np.array_equal(found.frames, on_cpu("t2v"))
    assert np.array_equal(given.frames, found.frames)


def test_noise_of_the_host_is_uploaded_once():
    with FakeCard() as card:
        load("t2v").to("cuda")(**arguments("t2v"))
    assert [wait.kind for wait in card.waits("draw_latents")] == ["upload"]


# ---- the card itself ----


def test_a_number_that_the_loop_reads_is_found(monkeypatch):
    guided = ClassifierFreeGuidance.guided

    def reading(self, positive, *rest):
        positive.abs().max().item()
        return guided(self, positive, *rest)

    monkeypatch.setattr(ClassifierFreeGuidance, "guided", reading)
    with FakeCard() as card:
        load("t2v").to("cuda")(**arguments("t2v"))
    more = told(card.waits("denoise")) - Counter(SAMPLING)
    assert more == {"reads a number in pipelines/call/guidance/guider.py:combine": STEPS}


@pytest.mark.parametrize("guidance", [*GUIDERS, "apg, gated"])
def test_no_formula_of_guidance_reads_a_number(guidance):
    others = {"slg": SkipLayer(layers=1, start=0, stop=1), "apg, gated": Gated("apg", after=0, refresh=1)}
    with FakeCard() as card:
        load("t2v").to("cuda")(**arguments("t2v", guidance=others.get(guidance, guidance)))
    assert told(card.waits("denoise")) == SAMPLING


def test_what_makes_the_host_wait():
    reads = {
        "reads a number": [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0])],
        "reads numbers": [lambda x: x.tolist()],
        "compares": [lambda x: torch.equal(x, x)],
        "counts": [lambda x: x.nonzero(), lambda x: x[x > 1], lambda x: x.unique()],
        "download": [lambda x: x.cpu(), lambda x: torch.empty(4).copy_(x)],
        "upload": [lambda x: torch.ones(4).to(x), lambda x: torch.tensor([1.0], device="cuda")],
        "event": [lambda x: torch.accelerator.current_stream().record_event().synchronize()],
    }
    with FakeCard() as card:
        x = torch.arange(4.0, device="cuda")
        for kind, functions in reads.items():
            for function in functions:
                card.recorded.clear()
                function(x)
                assert [wait.kind for wait in card.recorded] == [kind]


def test_what_does_not():
    with FakeCard() as card:
        x = torch.arange(4.0, device="cuda")
        pinned = torch.ones(4, pin_memory=True)
        x[0], x[1:] = 3, x[1:] * torch.tensor(2.0)
        found = x.to("cpu", non_blocking=True), x + pinned.to("cuda", non_blocking=True)
        assert not card.recorded
        assert found[0].isnan().all(), "nothing has waited for it"
        torch.accelerator.current_stream().record_event().synchronize()
        assert found[0].tolist() == [3, 2, 4, 6]
        assert found[1].tolist() == [4, 3, 5, 7]


def test_host_and_card_are_not_mixed():
    with FakeCard():
        x = torch.ones(4, device="cuda")
        for function in (torch.add, torch.dot, lambda a, b: torch.cat([a, b])):
            with pytest.raises(RuntimeError, match=r"tensors on the host, .* and on the card"):
                function(x, torch.ones(4))
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
