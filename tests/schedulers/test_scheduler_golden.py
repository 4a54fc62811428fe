"""The official code's timesteps, noise levels and trajectories, for every stored run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan22.schedulers import FlowMatchDPMSolverScheduler, FlowMatchUniPCScheduler

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = json.loads((GOLDEN / "schedulers.json").read_text())["runs"]
SOLVERS = {"unipc": FlowMatchUniPCScheduler, "dpmpp": FlowMatchDPMSolverScheduler}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "schedulers.io.safetensors")


@pytest.mark.parametrize("run", RUNS, ids=[run["key"] for run in RUNS])
@pytest.mark.parametrize("shift_from", ["config", "call"])
def test_run(run, shift_from, golden):
    if shift_from == "config":
        scheduler = SOLVERS[run["solver"]](shift=run["shift"])
        scheduler.set_timesteps(run["steps"])
    else:
        scheduler = SOLVERS[run["solver"]]()
        scheduler.set_timesteps(run["steps"], shift=run["shift"])
    expected = {name: golden[f"{run['key']}.{name}"] for name in ("timesteps", "sigmas", "trajectory")}

    assert scheduler.timesteps.dtype == torch.int64
    assert torch.equal(scheduler.timesteps, expected["timesteps"])
    assert torch.equal(scheduler.sigmas, expected["sigmas"])

    x = golden["x0"]
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * x) + (t / 1000) * x
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
        reference = expected["trajectory"][i + 1]
        assert (x - reference).norm() <= 1e-6 * reference.norm(), f"step {i}"


def test_every_solver_and_length_is_stored():
    assert {run["solver"] for run in RUNS} == {"unipc", "dpmpp"}
    assert {run["steps"] for run in RUNS} >= {1, 2, 4, 40, 50}
