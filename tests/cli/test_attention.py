"""Sparse self-attention on the command line: its option, what a preview says of it, and the recipe."""

import json

from tests.cli.commands import run
from tests.cli.test_planning import rows
from wan22 import read_recipe

SMALL = ["--steps", 3, "--frames", 17, "--seed", 1]
SPARSE = '{"method": "radial", "block": 2}'


def test_a_video_and_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("t2v", "a red circle", *SMALL, "--attention", SPARSE, "-o", "a.webp")
    run("t2v", "a red circle", *SMALL, "-o", "dense.webp")
    recipe = read_recipe("a.webp")
    assert recipe.attention["method"] == "radial" and recipe.attention["block"] == 2
    run("reproduce", "a.webp", "-o", "b.webp")
    assert read_recipe("b.webp").attention == recipe.attention


def test_previews_say_what_is_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = rows(run("t2v", "a", "--dry-run", "--attention", SPARSE)[0])
    assert found["attention"] == (
        "radial attention computes 88 % of self-attention's blocks in 14 of 20 steps and 5 of 6 layers; the "
        "time is with all of them"
    )
    assert "attention" not in rows(run("t2v", "a", "--dry-run")[0])
    planned = run("plan", "Wan2.2-T2V-A14B", "--attention", "radial", "--memory", 40, "--json")[0]
    words = "radial attention computes 36 % of self-attention's blocks in 29 of 40 steps and 39 of 40 layers"
    assert json.loads(planned)["settings"]["attention"] == words


def test_what_is_refused_is_named():
    _, told = run("t2v", "a", "--dry-run", "--attention", "radail", code=1)
    assert "--attention radail must be one of" in told and "the nearest is" in told
    _, told = run("t2v", "a", "--dry-run", "--attention", "math", code=1)
    assert "--attention-backend" in told
    _, told = run("t2v", "a", "--dry-run", "--attention", '{"method": "radial", "decay": -1}', code=1)
    assert "decay" in told and "0 or more" in told
    _, told = run("t2v", "a", "--dry-run", "--attention", '{"method": "radial", "deacy": 1}', code=1)
    assert "the nearest is decay" in told
    _, told = run("t2v", "a", "--steps", 2, "--attention", "sparge", code=1)
    assert "128 tokens" in told
