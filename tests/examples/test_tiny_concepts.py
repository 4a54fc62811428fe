"""A new colour and a new motion for the miniature: their clips show them, and are trained on from files."""

import json
import sys

import clips
import judge_lora
import lora_clips
import numpy as np
import pytest

from tests.cli.commands import run


@pytest.mark.parametrize("concept", lora_clips.CONCEPTS)
def test_clips_show_their_concept_and_others_do_not(concept):
    rng = np.random.default_rng(3)
    for scene in lora_clips.scenes_of(concept, 12, "held_out", rng):
        asked, caption = lora_clips.concept_of(concept, scene)
        assert (" orange " if concept == "orange" else " jumps ") in caption
        assert judge_lora.shows(concept, lora_clips.draw(concept, asked, rng))
        assert not judge_lora.shows(concept, clips.draw(scene, rng))


@pytest.mark.slow
@pytest.mark.parametrize("concept", lora_clips.CONCEPTS)
def test_from_videos_to_a_file(concept, tmp_path, monkeypatch):
    """By the three commands that its README names, with few clips and steps: they fit together."""
    arguments = ["--out", tmp_path / "clips", "--threads", 1, "--concept", concept, "--clips", 6]
    monkeypatch.setattr(sys, "argv", ["lora_clips.py", *map(str, arguments)])
    lora_clips.main()
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 6
    run("cache", tmp_path / "clips", "--model", "tiny-t2v", "-o", tmp_path / "cache", "-q")
    options = ["--data", tmp_path / "cache", "-o", tmp_path / "out", "--dtype", "fp32", "--device", "cpu"]
    options += ["--rank", 2, "--steps", 2, "--batch-size", 2, "--json"]
    found = json.loads(run("train", "--model", "tiny-t2v", *options)[0])
    pair = {"high": found["files"]["transformer"], "low": found["files"]["transformer_2"]}
    flags = ["--lora-high", pair["high"], "--lora-low", pair["low"], "--steps", "2", "--frames", "5"]
    run("t2v", "an orange circle", *flags, "-o", tmp_path / "video.mp4", "-q")
    assert (tmp_path / "video.mp4").stat().st_size > 0
