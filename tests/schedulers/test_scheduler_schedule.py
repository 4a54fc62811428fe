"""The shared schedule: conventions, custom tables, the step index, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from wan22.schedulers import FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler, FlowMatchUniPCScheduler
from wan22.schedulers.flow_match import shift_sigmas

SOLVERS = [FlowMatchUniPCScheduler, FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler]
LIGHTNING = [1000, 937.5, 833.3, 625]


@pytest.fixture(params=SOLVERS)
def scheduler(request):
    return request.param(shift=5.0)


def test_unipc_starts_below_one():
    scheduler = FlowMatchUniPCScheduler()
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0].item() == np.float32(0.999) == pytest.approx(0.99900001287, abs=1e-11)


@pytest.mark.parametrize("solver", [FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler])
def test_the_others_start_at_one_and_shift_once(solver):
    scheduler = solver(shift=12.0)
    scheduler.set_timesteps(4)
    expected = shift_sigmas(np.array([1, 0.75, 0.5, 0.25, 0]), 12.0)
    np.testing.assert_allclose(scheduler.sigmas, expected, rtol=1e-7)
    assert scheduler.timesteps[0] == 1000


def test_euler_keeps_the_timesteps_few_step_checkpoints_are_trained_on():
    scheduler = FlowMatchEulerScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    np.testing.assert_allclose(scheduler.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-7)


def test_shift_of_one_call_does_not_outlive_it(scheduler):
    scheduler.set_timesteps(4)
    first = scheduler.sigmas
    scheduler.set_timesteps(4, shift=12.0)
    assert (scheduler.sigmas[1:-1] > first[1:-1]).all()
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.sigmas, first)
    assert scheduler.config.shift == 5.0


def test_custom_timesteps_are_used_as_they_are(scheduler):
    scheduler.set_timesteps(timesteps=LIGHTNING)
    assert torch.equal(scheduler.timesteps, torch.tensor(LIGHTNING))
    np.testing.assert_allclose(scheduler.sigmas, [1, 0.9375, 0.8333, 0.625, 0], rtol=1e-7)
    x = torch.ones(1, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, 0.5), t, x).prev_sample
    # A constant velocity is a straight path, which every solver follows exactly.
    torch.testing.assert_close(x, torch.full_like(x, 0.5))


def test_custom_sigmas_are_used_as_they_are(scheduler):
    scheduler.set_timesteps(3, sigmas=[0.9995, 0.6, 0.1])
    np.testing.assert_array_equal(scheduler.sigmas, np.array([0.9995, 0.6, 0.1, 0], np.float32))
    expected = [999.5, 600, 100] if isinstance(scheduler, FlowMatchEulerScheduler) else [999, 600, 100]
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.num_inference_steps == 3


def test_repeated_timesteps_are_stepped_by_index(scheduler):
    """At shift 12 truncation makes early timesteps equal; each still has its own noise level."""
    scheduler.set_timesteps(150, shift=12.0)
    if not isinstance(scheduler, FlowMatchEulerScheduler):
        assert len(scheduler.timesteps.unique()) < 145
    x = torch.ones(2)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.full_like(x, 0.5), t, x).prev_sample
        assert scheduler.step_index == i + 1
        torch.testing.assert_close(
            x, 1 - 0.5 * (scheduler.sigmas[0] - scheduler.sigmas[i + 1]).expand(2), atol=1e-4, rtol=0
        )


def test_official_timesteps_repeat_at_shift_12_with_100_steps():
    scheduler = FlowMatchUniPCScheduler(shift=12.0)
    scheduler.set_timesteps(100)
    assert len(scheduler.timesteps.unique()) == 99 and len(scheduler.sigmas.unique()) == 101


def test_begin_index(scheduler):
    scheduler.set_timesteps(10)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_begin_index(4)
    assert scheduler.begin_index == 4
    x, v = torch.ones(2), torch.full((2,), 0.5)
    by_index = scheduler.step(v, None, x).prev_sample
    assert scheduler.step_index == 5
    s, t = scheduler.sigmas[4:6]
    torch.testing.assert_close(by_index, x + (t - s) * v)

    scheduler.set_timesteps(10)
    assert scheduler.begin_index is None
    by_timestep = scheduler.step(v, scheduler.timesteps[4], x).prev_sample
    assert scheduler.step_index == 5
    assert torch.equal(by_index, by_timestep)


def test_scale_noise(scheduler):
    scheduler.set_timesteps(4)
    sample, noise = torch.zeros(2, 3, 1), torch.ones(2, 3, 1)
    first = scheduler.scale_noise(sample, scheduler.timesteps[:2], noise)
    assert torch.equal(first[:, 0, 0], scheduler.sigmas[:2])
    assert torch.equal(scheduler.add_noise(sample, noise, scheduler.timesteps[:2]), first)
    scheduler.set_begin_index(2)
    assert (scheduler.scale_noise(sample, scheduler.timesteps[:1], noise) == scheduler.sigmas[2]).all()
    assert scheduler.scale_noise(sample.bfloat16(), 0, noise).dtype == torch.bfloat16


def test_diffusers_interface(scheduler):
    x = torch.ones(2)
    scheduler.set_timesteps(2, device="cpu")
    assert scheduler.scale_model_input(x, 999) is x
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000
    as_tuple = scheduler.step(x, scheduler.timesteps[0], x, generator=None, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no schedule was given"),
        ({"num_inference_steps": 0}, "=0 must be an int, at least 1; the nearest is 1"),
        ({"num_inference_steps": 4.2}, "=4.2 must be an int, at least 1; the nearest is 4"),
        ({"num_inference_steps": 4, "shift": 0.0}, r"shift=0\.0 must be a number, above 0; 1 leaves"),
        ({"num_inference_steps": 4, "shift": float("nan")}, "shift=nan must be a finite number"),
        ({"num_inference_steps": 4, "shift": 1e12}, "closer than float32"),
        ({"sigmas": [0.9], "timesteps": [902]}, r"sigmas\[0\] = 0.9 contradicts timesteps\[0\] = 902; 0.902"),
        ({"sigmas": [0.9, 0.5], "timesteps": [900]}, "2 sigmas contradict 1 timesteps"),
        ({"sigmas": []}, "at least 1 value"),
        ({"sigmas": [0.9, 0.5], "num_inference_steps": 3}, "contradicts 2 sigmas"),
        ({"sigmas": [0.9, 0.5], "shift": 5.0}, "leave the shift out"),
        ({"sigmas": [1.5, 0.5]}, r"\(0, 1\], got sigmas\[0\] = 1.5; the nearest are \[1, 0.5\]"),
        ({"sigmas": [0.9, 0.0]}, r"sigmas\[1\] = 0; the final 0 is appended"),
        ({"sigmas": [0.5, 0.9]}, r"sigmas\[1\] = 0.9 after 0.5; the nearest are \[0.9, 0.5\]"),
        ({"timesteps": [900, 900]}, r"timesteps\[1\] = 900 after 900"),
        (
            {"timesteps": [1001, 900]},
            r"\(0, 1000\], got timesteps\[0\] = 1001; the nearest are \[1000, 900\]",
        ),
        ({"timesteps": [float("nan")]}, "must lie in"),
    ],
)
def test_set_timesteps_refuses(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)


def test_step_refuses(scheduler):
    x = torch.ones(2)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.set_begin_index(0)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="shaped like sample"):
        scheduler.step(x[None], None, x)
    with pytest.raises(ValueError, match=r"timestep 3 is not in the schedule; the nearest is 8\d\d"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="must be one value"):
        scheduler.step(x, scheduler.timesteps, x)
    with pytest.raises(ValueError, match="begin_index=2 must be an int, 0 to 1; the nearest is 1"):
        scheduler.set_begin_index(2)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="past the end, the last is 1"):
        scheduler.step(x, scheduler.timesteps[-1], x)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": -1.0}, r"shift=-1\.0 must be a number, above 0"),
        ({"num_train_timesteps": 1}, "=1 must be an int, at least 2; the nearest is 2"),
    ],
)
def test_construction_refuses(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        solver(**arguments)


@pytest.mark.parametrize("solver", SOLVERS[:2])
def test_solver_order_is_one_or_two(solver):
    with pytest.raises(ValueError, match="solver_order=3 must be an int, 1 to 2; the nearest is 2"):
        solver(solver_order=3)


def test_import_is_light():
    code = (
        "import sys, wan22.schedulers as s; assert 'torch' not in sys.modules; s.FlowMatchUniPCScheduler;"
        "heavy = 'wan22.pipelines', 'wan22.models', 'diffusers.pipelines', 'transformers';"
        "assert not [name for name in sys.modules if name.startswith(heavy)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
