"""A schedule in which the size changes, on the command line: its option, a preview, the recipe."""

import json

import pytest

from tests.cli.commands import run
from tests.cli.test_planning import rows
from wan22 import read_recipe
from wan22.accel.planning.costs import forward_flops

SMALL = ["--steps", 8, "--frames", 5, "--seed", 1]


def test_a_video_and_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("t2v", "a red circle", *SMALL, "--resolution-schedule", "[[0.75, 0.5]]", "-o", "a.webp")
    recipe = read_recipe("a.webp")
    assert recipe.call["resolution_schedule"] == [[0.75, 0.5]]
    assert recipe.sizes == ((48, 48, 4), (64, 64, 4))
    run("reproduce", "a.webp", "-o", "b.webp")
    assert read_recipe("b.webp").sizes == recipe.sizes


def test_a_preview_counts_the_tokens_of_each_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = rows(run("t2v", "a", "--dry-run", "--resolution-schedule", "coarse-to-fine")[0])
    assert "20 steps (10 at 48x48, 10 at 64x64) of UniPC" in words["video"]
    assert "40 of a transformer" in words["passes"]
    arguments = ["--memory", 80, "--json", "--resolution-schedule", "[[0.75, 0.5]]"]
    found = json.loads(run("plan", "Wan2.2-T2V-A14B", *arguments)[0])["settings"]
    assert found["sizes"] == [[960, 544, 20], [1280, 720, 20]]
    ratio = _flops(21 * 34 * 60) / _flops(21 * 45 * 80)
    assert found["passes"] == 80 and found["work"] == pytest.approx(40 + 40 * ratio)
    assert 0.75**4 < ratio < 0.75**2, "attention takes more than in proportion"


def _flops(tokens):
    from wan22.presets import T2V_A14B

    class Config:
        num_attention_heads, attention_head_dim = T2V_A14B.dim // 128, 128
        ffn_dim, num_layers = 13824, 40

    return forward_flops(Config, tokens)


def test_what_is_refused_is_named():
    _, told = run("t2v", "a", "--dry-run", "--resolution-schedule", "[[0.1, 0.5]]", code=1)
    assert "--resolution-schedule[0][0]=0.1 must be" in told
    _, told = run("t2v", "a", "--dry-run", "--resolution-schedule", "tiny", code=1)
    assert "--resolution-schedule='tiny' must be" in told or "coarse-to-fine" in told
