"""What parts of a call take: memory of the autoencoder, on the device and on the host, and arithmetic."""

import pytest

from tests.builders import latents_of, random_i2v_pipeline, random_pipeline
from tests.builders import random_ti2v_pipeline as ti2v
from wan22 import accel, presets
from wan22.accel.planning.costs import Task, cached_bytes, forward_flops
from wan22.accel.planning.meta_models import meta_copies, released_models
from wan22.accel.planning.passes import GUIDED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "size", "most"),
    [(presets.TI2V_5B, (1280, 704, 121), 5e9), (presets.I2V_A14B, (1280, 720, 81), 4e9)],
)
def test_decoding_in_little_memory(preset, size, most):
    """Beyond the weights, at real sizes; encoding takes no more."""
    task = Task(preset.name, released_models(preset), size, None, GUIDED)
    peaks = [task.decode(strips, True) for strips in (None, 2, 4, 8, 16)]
    device = [peak.device for peak in peaks]
    assert device == sorted(device, reverse=True)
    assert device[2] <= most and device[3] <= 0.6 * most
    host = [peak.host for peak in peaks]
    assert host[0] == 0 and host == sorted(host) and host[-1] <= 1.15 * host[1]
    for strips, decoding in zip((None, 2, 4, 8, 16), device, strict=True):
        assert 0 < task.encode(strips, True).device < decoding
    # Without a device the histories stay where the strips are.
    assert host[2] / 2 < task.decode(4).device - device[2] < host[2]


@pytest.mark.parametrize(
    ("form", "frames"),
    [(random_pipeline, 0), (random_i2v_pipeline, 81), (ti2v, 1)],
    ids=["t2v", "i2v", "ti2v"],
)
def test_frames_that_are_encoded(form, frames):
    task = Task("a", meta_copies(form().components), (32, 32, 81), None, GUIDED)
    assert task.encoded_frames == frames


def test_encoding_an_image_is_a_phase():
    pipe, size = random_i2v_pipeline(), {"height": 32, "width": 32, "num_frames": 5}
    for device in ("cpu", "cuda"):
        budget = {"ram": "8GB", "device": device} | ({"vram": "8GB"} if device == "cuda" else {})
        phases = accel.plan(pipe, **size, **budget).phases
        assert [phase.name for phase in phases] == ["text", "encode", "denoise", "decode"]
        assert phases[1].activations > 0
    plain = accel.plan(random_pipeline(), **size, **budget)
    assert [phase.name for phase in plain.phases] == ["text", "denoise", "decode"]


def test_flops_of_the_released_checkpoints():
    """Those of FACTS, within a percent: 480p and 720p of A14B, and TI2V-5B."""
    a14b = released_models(presets.T2V_A14B)["transformer"].config
    ti2v_5b = released_models(presets.TI2V_5B)["transformer"].config
    for config, tokens, tera in ((a14b, 32760, 1678), (a14b, 75600, 6523), (ti2v_5b, 27280, 517)):
        assert forward_flops(config, tokens) / 1e12 == pytest.approx(tera, rel=0.01)


def test_what_a_step_cache_keeps():
    """Those of a 14B model at 720p: 75,600 tokens of 5,120 in bfloat16, of two passes."""
    assert cached_bytes(75_600, 5_120, passes=2) == 2 * 75_600 * 5_120 * 2
    assert cached_bytes(75_600, 5_120, 2, residuals=2, itemsize=4) == 4 * cached_bytes(75_600, 5_120, 2)
    pipe, size = random_pipeline(), {"height": 32, "width": 32, "num_frames": 5}
    plans = [accel.plan(pipe, **size, vram="8GB", ram="8GB", residuals=n, videos=3) for n in range(3)]
    assert [plan.residuals for plan in plans] == [0, 1, 2]
    denoising = [next(p.activations for p in plan.phases if p.name == "denoise") for plan in plans]
    tokens = 2 * 2 * 2
    assert denoising[2] - denoising[1] == cached_bytes(tokens, 48, passes=6, itemsize=4)
    assert denoising[1] - denoising[0] == cached_bytes(tokens, 48, 6, itemsize=4) + 3 * tokens * 48 * 4


def test_a_call_with_a_cache_is_planned_for():
    pipe = random_pipeline()
    pipe.fit(device="cpu", height=32, width=32, num_frames=5)
    assert pipe.memory_plan.residuals == 0
    latents_of(pipe, num_inference_steps=8, cache="taylor")
    assert pipe.memory_plan.residuals == 2
    latents_of(pipe, num_inference_steps=8, cache="easy")
    assert pipe.memory_plan.residuals == 2, "what was planned for has room for less"
    pipe.release()
