"""What a plan for the CPU says of memory is what a process takes, at sizes where it matters."""

import json
import subprocess
import sys

import pytest

from wan22.accel.planning.planner import HOST_WORKSPACE

MOST_PASS, SOME_PASS, ALL_STAY = 2e9, 3e9, 8e9


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("form", "ram"),
    [
        *[(form, ram) for form in ("float32", "bfloat16") for ram in (MOST_PASS, SOME_PASS, ALL_STAY)],
        *[(form, MOST_PASS) for form in ("scaled_fp8", "gguf", "pth")],
        ("scaled_fp8", ALL_STAY),
    ],
)
def test_memory_is_as_planned(form, ram, tmp_path):
    """Anonymous and mapped, within 10 %, in whatever form the weights are stored.

    What buffers of kernels take depends on the CPU: next to nothing without instructions for bf16.
    """
    command = [sys.executable, "-m", "tests.accel.planning.real_memory", str(tmp_path), form, str(ram)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["all"] > 3e9
    assert found["kind"] == ("host" if ram == ALL_STAY else "streamed")
    planned, measured = found["planned"], found["measured"]
    assert planned["anonymous"] <= ram
    assert measured["mapped"] == pytest.approx(planned["mapped"], rel=0.1)
    assert (
        0.9 * (planned["anonymous"] - HOST_WORKSPACE) <= measured["anonymous"] <= 1.1 * planned["anonymous"]
    )
