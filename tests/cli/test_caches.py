"""A step cache on the command line: its option, what a preview says of it, and the recipe."""

import json

from tests.cli.commands import run
from tests.cli.test_planning import rows
from wan22 import read_recipe, tiny_checkpoint

SMALL = ["--steps", 8, "--frames", 5, "--seed", 1]


def test_a_video_and_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("t2v", "a red circle", *SMALL, "--cache", "taylor:high", "-o", "a.webp")
    recipe = read_recipe("a.webp")
    assert recipe.call["cache"]["method"] == "taylor"
    ((computed, of),) = recipe.passes
    assert computed < of == 16
    run("reproduce", "a.webp", "-o", "b.webp")
    assert read_recipe("b.webp").passes == recipe.passes


def test_previews_say_how_many_passes_there_are_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tiny_checkpoint() / "cache_ratios.json"
    for cache in ("mag", file):
        found = rows(run("t2v", "a", "--dry-run", "--cache", cache)[0])
        expected = "at most 18 of a transformer, for each video, in place of 40, by the cache mag"
        assert found["passes"] == expected
    found = rows(run("t2v", "a", "--dry-run", "--fast", "medium")[0])
    expected = "40 of a transformer, for each video, less what the cache easy skips as it goes"
    assert found["passes"] == expected
    found = json.loads(run("plan", "Wan2.2-T2V-A14B", "--cache", "mag:low", "--memory", 40, "--json")[0])
    assert found["settings"]["passes"] < found["settings"]["all_passes"] == 80
    assert found["settings"]["residuals"] == 1


def test_what_is_refused_is_named():
    _, told = run("t2v", "a", "--dry-run", "--cache", "lazy", code=1)
    assert "cache='lazy' must be one of easy, mag, taylor" in told or "cache" in told
    _, told = run("t2v", "a", "--dry-run", "--steps", 4, "--cache", "easy", code=1)
    assert "at least 8 steps" in told
    _, told = run("t2v", "a", "--dry-run", "--cache", "none.json", code=1)
    assert "there is no file none.json" in told
