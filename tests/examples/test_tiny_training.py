"""The training of the embedded checkpoint runs end to end and leaves a checkpoint that the pipeline loads."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import wan22

SCRIPTS = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run a training script as the command line would, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), "--threads", "1", *options])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    return run


@pytest.mark.slow
def test_scripts_make_a_checkpoint_that_the_pipeline_loads(run_script, tmp_path, capsys):
    run_script("train_vae.py", "--smoke")
    run_script("train_vae.py", "--smoke", "--resume")  # nothing is left to train; the results are the same
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round trip")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    run_script("cache_latents.py", "--smoke")
    run_script("train_t2v.py", "--smoke")
    checkpoint = tmp_path / "t2v"
    run_script("export.py", "--to", str(checkpoint))

    pipe = wan22.WanT2VPipeline.from_pretrained(checkpoint)
    assert pipe.config.boundary_ratio == 0.875
    high, low = pipe.transformer.state_dict(), pipe.transformer_2.state_dict()
    assert high.keys() == low.keys()
    assert any(not torch.equal(high[name], low[name]) for name in high)  # each expert was trained on its own
    video = pipe("a red circle", num_inference_steps=2, height=32, width=32, num_frames=5, output_type="np")
    assert video.frames[0].shape == (5, 32, 32, 3)
