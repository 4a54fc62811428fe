"""Where memory runs out: the error tells the phase, what was taken and what fits; the next call works."""

import copy
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from tests.accel.offload.recording import RecordingDevice
from tests.accel.planning.test_planner import plan_in
from tests.builders import SMALL, random_i2v_pipeline
from tests.pipelines.attached.test_calls import Threads
from wan22.accel.planning.passes import GUIDED

PHASES = {
    "encoding the prompt": lambda pipe: pipe.text_encoder,
    "encoding the image": lambda pipe: pipe.vae.encoder,
    "denoising, step 1 of 3, high noise": lambda pipe: pipe.transformer.blocks[1],
    "denoising, step 3 of 3, low noise": lambda pipe: pipe.transformer_2.blocks[0],
    "decoding": lambda pipe: pipe.vae.decoder,
}
ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: x"),
    "Python": MemoryError("Unable to allocate 2 GiB for an array"),
}


def video(pipe, **arguments):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    return pipe(picture, "a", **{**SMALL, "seed": 1, **arguments}).frames


def running_out(module, error):
    """Let a module run out of memory; return what it held by then, weakly."""
    held = []

    def hook(module, args):
        tensor = torch.empty(1000)
        held.append(weakref.ref(tensor))
        raise copy.copy(error)

    return module.register_forward_pre_hook(hook), held


@pytest.fixture(scope="module")
def expected():
    return video(random_i2v_pipeline())


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("what", PHASES)
def test_memory_that_runs_out(what, kind, fitted, expected):
    if fitted and kind != "device":
        pytest.skip("once is enough")
    pipe = copy.deepcopy(random_i2v_pipeline())
    device = RecordingDevice()
    if fitted:
        pipe.apply(plan_in(pipe, 10**9), device)
        video(pipe)
    resident, error = device.resident, ERRORS[kind]
    handle, held = running_out(PHASES[what](pipe), error)
    with pytest.raises(MemoryError if kind == "Python" else torch.OutOfMemoryError) as caught:
        video(pipe)
    told = str(caught.value)
    assert told.startswith(f"memory ran out while {what}: {str(error).splitlines()[0]}; ")
    assert "GB of the host's memory were free; " in told
    assert ("; the plan counts on " if fitted else "; pipe.fit() finds a plan that takes ") in told
    assert "\n" not in told
    assert held and not any(tensor() is not None for tensor in held), "the error keeps no tensors"
    assert device.resident == resident
    handle.remove()
    assert np.array_equal(video(pipe), expected)
    with Threads(lambda: video(pipe)) as threads:
        pass
    assert np.array_equal(threads.results[0], expected)


def test_a_stream_that_runs_out(expected):
    pipe = copy.deepcopy(random_i2v_pipeline())
    picture = Image.new("RGB", (32, 32))
    handle, _ = running_out(pipe.vae.decoder, ERRORS["device"])
    with pytest.raises(torch.OutOfMemoryError, match="memory ran out while decoding: CUDA out of memory"):
        list(pipe.stream(picture, "a", seed=1, **SMALL))
    handle.remove()
    assert np.array_equal(video(pipe), expected)


def test_nothing_fits(monkeypatch):
    """Then planning says what would."""

    def plan(pipe, **size):
        asked.append(size)
        raise ValueError("it does not fit into 1 GB; 16x16 with 1 frames would fit\nand more")

    asked, pipe = [], copy.deepcopy(random_i2v_pipeline())
    monkeypatch.setattr("wan22.accel.planning.planner.plan", plan)
    running_out(pipe.text_encoder, ERRORS["device"])
    with pytest.raises(torch.OutOfMemoryError, match=r"; it does not fit .* 16x16 with 1 frames would fit$"):
        video(pipe)
    others = {"passes": GUIDED, "device": torch.device("cpu")}
    assert asked == [{"height": 32, "width": 32, "num_frames": 5, "videos": 1} | others]


@pytest.mark.parametrize("error", [MemoryError("mine"), torch.OutOfMemoryError("mine"), RuntimeError("mine")])
def test_what_a_callback_raises_is_raised(error):
    def callback(pipe, step, timestep, tensors):
        raise error

    with pytest.raises(type(error)) as caught:
        video(random_i2v_pipeline(), callback_on_step_end=callback)
    assert caught.value is error


def test_other_errors_of_a_model_are_raised_as_they_are():
    pipe = copy.deepcopy(random_i2v_pipeline())
    running_out(pipe.transformer, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access$"):
        video(pipe)
