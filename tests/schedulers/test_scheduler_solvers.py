"""Each solver against an independent float64 formula, an ODE with a known solution, and diffusers."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from wan22.schedulers import FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler, FlowMatchUniPCScheduler

UNIPC, DPMPP, EULER = FlowMatchUniPCScheduler, FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler


def velocity(x, sigma):
    """A nonlinear field, the same formula for numpy and torch."""
    sin = torch.sin if isinstance(x, torch.Tensor) else np.sin
    return sin(x) + 0.5 * sigma * x


def run(scheduler, x):
    trajectory = []
    for sigma, t in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(x, sigma), t, x).prev_sample
        trajectory.append(x)
    return torch.stack(trajectory)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- reference: x_t = sigma_t (x_s / sigma_s + integral of exp(lambda) x0(lambda) dlambda) ----


def lam(sigma):
    with np.errstate(divide="ignore"):
        return np.log(1 - sigma) - np.log(sigma)


def hold(x, s, t, x0):
    """The integral for a constant x0."""
    return t / s * x + ((1 - t) - t / s * (1 - s)) * x0


def midpoint(x, s, t, x0, before):
    """x0 held at its linear extrapolation to mid-interval; `before` is (sigma, x0) one step back."""
    slope = 0 if before[0] == 1 else (x0 - before[1]) / (lam(s) - lam(before[0]))
    return hold(x, s, t, x0 + slope * (lam(t) - lam(s)) / 2)


def quadratic(x, s, t, points):
    """The integral of the parabola in lambda through three (sigma, x0), by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    a, b = lam(s), lam(t)
    total = 0.0
    for node, weight in zip((b - a) / 2 * nodes + (a + b) / 2, weights * (b - a) / 2, strict=True):
        for i, (sigma_i, value) in enumerate(points):
            others = [lam(p) for j, (p, _) in enumerate(points) if j != i]
            total += (
                weight * math.exp(node) * value * np.prod([(node - o) / (lam(sigma_i) - o) for o in others])
            )
    return t / s * x + t * total


def reference_unipc(sigmas, x):
    trajectory, x0s, corrected = [], [], None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x0 = x - s * velocity(x, s)
        if i == 1:
            x = hold(corrected, sigmas[0], s, (x0s[0] + x0) / 2)
        elif i > 1:
            x = quadratic(
                corrected, sigmas[i - 1], s, [(sigmas[i - 2], x0s[-2]), (sigmas[i - 1], x0s[-1]), (s, x0)]
            )
        corrected = x
        first_order = i == 0 or t == 0
        x = hold(x, s, t, x0) if first_order else midpoint(x, s, t, x0, (sigmas[i - 1], x0s[-1]))
        x0s.append(x0)
        trajectory.append(x)
    return np.stack(trajectory)


def reference_dpmpp(sigmas, x):
    trajectory, before = [], None
    for s, t in pairwise(sigmas):
        x0 = x - s * velocity(x, s)
        x = hold(x, s, t, x0) if before is None or t == 0 else midpoint(x, s, t, x0, before)
        before = (s, x0)
        trajectory.append(x)
    return np.stack(trajectory)


def reference_euler(sigmas, x):
    trajectory = []
    for s, t in pairwise(sigmas):
        x = x + (t - s) * velocity(x, s)
        trajectory.append(x)
    return np.stack(trajectory)


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize(
    ("solver", "reference"), [(UNIPC, reference_unipc), (DPMPP, reference_dpmpp), (EULER, reference_euler)]
)
def test_matches_float64_formula(solver, reference, steps):
    scheduler = solver(shift=3.0)
    scheduler.set_timesteps(steps)
    x = noise(2, 3, 2, 4)
    expected = torch.from_numpy(reference(scheduler.sigmas.double().numpy(), x.double().numpy()))
    error = (run(scheduler, x) - expected).norm() / expected.norm()
    assert error <= 1e-6


@pytest.mark.parametrize("solver", [UNIPC, DPMPP, EULER])
def test_start_at_sigma_one(solver):
    """log SNR is -inf there: the second-order terms must take their limit instead of becoming nan."""
    x, scheduler = noise(2, 3, 2, 4), solver()
    scheduler.set_timesteps(sigmas=[1.0, 0.9375, 0.8, 0.5, 0.2])
    limit = run(scheduler, x)
    scheduler.set_timesteps(sigmas=[1 - 6e-8, 0.9375, 0.8, 0.5, 0.2])
    assert torch.isfinite(limit).all()
    torch.testing.assert_close(limit, run(scheduler, x), rtol=0, atol=0.02)


# ---- order of convergence ----


@pytest.mark.parametrize(
    ("solver", "settings", "order"),
    [
        (UNIPC, {}, 3),  # the corrector adds one to the predictor's order
        (UNIPC, {"solver_order": 1}, 2),
        (DPMPP, {}, 2),
        (DPMPP, {"solver_order": 1}, 1),
        (EULER, {}, 1),
    ],
)
def test_order_of_convergence(solver, settings, order):
    """Gaussian data N(m, d^2) flows as x(sigma) = (1 - sigma) m + sqrt(V(sigma)) z, z constant on a path.

    Levels equidistant in log SNR, without the first-order step to sigma 0, let the orders show cleanly.
    """
    mean, deviation = 0.7, 0.6

    def variance(sigma):
        return (1 - sigma) ** 2 * deviation**2 + sigma**2

    def exact(sigma):
        return (1 - sigma) * mean + math.sqrt(variance(sigma)) * z

    z, errors = noise(64).double(), []
    for steps in (32, 64, 128):
        scheduler = solver(**settings)
        scheduler.set_timesteps(sigmas=torch.sigmoid(torch.linspace(3, -3, steps + 1)))
        sigmas = scheduler.sigmas.tolist()
        x = exact(sigmas[0]).float()
        for sigma in sigmas[:steps]:
            rate = (sigma - (1 - sigma) * deviation**2) / variance(sigma)  # V' / 2V
            x = scheduler.step(-mean + rate * (x - (1 - sigma) * mean), None, x).prev_sample
        errors.append((x - exact(sigmas[steps])).norm().item())
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(value - order) < 0.1 for value in measured), measured


# ---- diffusers' solvers, given the same noise levels ----


def diffusers_unipc(sigmas):
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy())
    return scheduler


def diffusers_dpmpp(sigmas):
    """Its set_timesteps takes no noise levels, so they are put in place."""
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    return scheduler


def diffusers_euler(sigmas):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy())
    return scheduler


@pytest.mark.parametrize("steps", [1, 4, 40])
@pytest.mark.parametrize(
    ("solver", "theirs"), [(UNIPC, diffusers_unipc), (DPMPP, diffusers_dpmpp), (EULER, diffusers_euler)]
)
def test_matches_diffusers(solver, theirs, steps):
    ours = solver(shift=5.0)
    ours.set_timesteps(steps)
    other = theirs(ours.sigmas)
    assert torch.equal(other.sigmas, ours.sigmas)
    other.set_begin_index(0)
    x = noise(2, 3, 2, 4)
    torch.testing.assert_close(run(ours, x), run(other, x), rtol=0, atol=1e-6)


# ---- properties of a step ----


@pytest.mark.parametrize("solver", [UNIPC, DPMPP, EULER])
class TestStep:
    def test_a_sample_does_not_depend_on_its_batch(self, solver):
        batch = noise(3, 2, 4)
        scheduler = solver(shift=5.0)
        scheduler.set_timesteps(6)
        together = run(scheduler, batch)
        scheduler.set_timesteps(6)
        alone = run(scheduler, batch[1:2])
        assert torch.equal(together[:, 1:2], alone)

    def test_set_timesteps_forgets_the_last_run(self, solver):
        scheduler = solver(shift=5.0)
        scheduler.set_timesteps(6)
        first = run(scheduler, noise(2, 4))
        scheduler.set_timesteps(3)
        run(scheduler, noise(2, 4, seed=1))
        scheduler.set_timesteps(6)
        assert torch.equal(run(scheduler, noise(2, 4)), first)

    def test_leaves_its_inputs_alone(self, solver):
        scheduler = solver(shift=5.0)
        scheduler.set_timesteps(3)
        x = noise(2, 4)
        for t in scheduler.timesteps:
            v = velocity(x, 0.5)
            kept = x.clone(), v.clone()
            result = scheduler.step(v, t, x).prev_sample
            assert torch.equal(x, kept[0]) and torch.equal(v, kept[1])
            x = result

    def test_half_precision_is_stepped_in_float32(self, solver):
        scheduler = solver(shift=5.0)
        x, v = noise(2, 256).bfloat16(), noise(2, 256, seed=1).bfloat16()
        scheduler.set_timesteps(4)
        half = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
        scheduler.set_timesteps(4)
        full = scheduler.step(v.float(), scheduler.timesteps[0], x.float()).prev_sample
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.bfloat16())

    def test_the_first_step_is_straight(self, solver):
        """Without history every solver takes a straight step."""
        scheduler = solver(shift=3.0)
        scheduler.set_timesteps(2)
        s, t, _ = scheduler.sigmas.tolist()
        x, v = noise(2, 4), noise(2, 4, seed=1)
        torch.testing.assert_close(scheduler.step(v, None, x).prev_sample, x + (t - s) * v)
