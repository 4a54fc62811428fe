"""A training whose process is killed again and again, and goes on, ends with the same weights to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.accel.parallel.ranks import environment
from tests.training.conftest import clips_of, settings
from wan22.training.data.cached import CachedClips
from wan22.training.loop import Training

ROOT = Path(__file__).parents[2]
KILLS, PATIENCE = 10, 120.0  # of waiting for a step, in seconds
CHANGES = {"steps": 12, "save_every": 1, "ema": 0.9, "batch_size": 1, "accumulation": 2, "keep": 1}


def go_on(folder):
    """Train in this process, from the last state if there is one."""
    torch.set_num_threads(1)
    CachedClips.open = staticmethod(clips_of)
    Training(settings(folder, **CHANGES), resume=True).run()


def steps_in(log):
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_weights(tmp_path):
    chance, killed, out = random.Random(5), 0, tmp_path / "killed"
    code = "from tests.training.test_kills import go_on; go_on({!r})"
    total = 2 * CHANGES["steps"]
    targets = sorted(chance.sample(range(1, total), KILLS))
    for target in targets:
        process = subprocess.Popen([sys.executable, "-c", code.format(str(out))], env=environment(), cwd=ROOT)
        start = time.monotonic()
        while steps_in(out / "losses.jsonl") < target and process.poll() is None:
            assert time.monotonic() - start < PATIENCE
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))  # within a step, or while its state is written
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed == KILLS
    for folder in (out, tmp_path / "whole"):  # with as many threads, whose number changes rounding
        command = [sys.executable, "-c", code.format(str(folder))]
        subprocess.run(command, env=environment(), check=True, cwd=ROOT)
    for name in ("lora_high_noise", "lora_low_noise"):
        found, expected = (load_file(tmp_path / f / f"{name}.safetensors") for f in ("killed", "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    logs = [(tmp_path / f / "losses.jsonl").read_text() for f in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert not list((out / "steps").rglob(".wan22-*"))
