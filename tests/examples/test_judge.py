"""The judge: right on the generator's own clips, also damaged ones; not fooled by noise or wrong captions."""

import json
import sys
from types import SimpleNamespace

import clips
import judge
import numpy as np
import pytest
import sheet
from PIL import Image

FLIPPED = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "growing": "shrinking",
    "shrinking": "growing",
}


@pytest.fixture(scope="module")
def sample():
    """Held-out clips, every motion equally often."""
    scenes = judge.choose_scenes(88, motions=clips.MOTIONS)
    rng = np.random.default_rng(11)
    return scenes, np.stack([clips.draw(scene, rng) for scene in scenes])


def scores_of(scenes, videos):
    return judge.score(scenes, [judge.judge(video) for video in videos])


def to_uint8(videos):
    return np.clip(np.rint(videos), 0, 255).astype(np.uint8)


def soften(videos):
    """Three passes of a 3 by 3 box: about the softness of a small autoencoder."""
    x = videos.astype(np.float32)
    for axis in (2, 3) * 3:
        x = (np.roll(x, 1, axis) + x + np.roll(x, -1, axis)) / 3
    return x


def test_reads_the_generators_own_clips(sample):
    scores = scores_of(*sample)
    assert min(scores[name] for name in ("color", "background", "motion", "size_change")) >= 0.99
    assert scores["shape"] >= 0.95
    assert set(scores["per_motion"]) == set(clips.MOTIONS)


@pytest.mark.parametrize("damage", ["noise", "blur", "drift", "all"])
def test_reads_damaged_clips(sample, damage):
    scenes, videos = (part[:55] for part in sample)  # five of each motion
    rng = np.random.default_rng(0)
    x = soften(videos) if damage in ("blur", "all") else videos.astype(np.float32)
    if damage in ("drift", "all"):
        x = x + np.linspace(-15, 15, x.shape[1])[:, None, None, None] * np.array([1, -0.5, 0.7])
    if damage in ("noise", "all"):
        x = x + rng.normal(0, 12, x.shape)
    scores = scores_of(scenes, to_uint8(x))
    assert min(scores[name] for name in ("color", "background", "motion", "size_change", "shape")) >= 0.97


def test_other_sizes_read_alike():
    rng = np.random.default_rng(4)
    scenes = judge.choose_scenes(22, motions=clips.MOTIONS)
    scores = scores_of(scenes, [clips.draw(scene, rng, size=128, frames=17) for scene in scenes])
    assert scores["all"] == 1.0


def test_reversed_clips_read_as_the_opposite(sample):
    scenes, videos = sample
    for scene, video in zip(scenes, videos, strict=True):
        if scene.motion in FLIPPED:
            assert judge.judge(video[::-1]).motion == FLIPPED[scene.motion]


def test_mirrored_clips_swap_left_and_right(sample):
    scenes, videos = sample
    for scene, video in zip(scenes, videos, strict=True):
        if scene.motion in ("left", "right"):
            assert judge.judge(video[:, :, ::-1]).motion == FLIPPED[scene.motion]
        elif scene.motion in ("up", "down", "still"):
            assert judge.judge(video[:, :, ::-1]).motion == scene.motion


def test_shuffled_captions_score_near_chance(sample):
    scenes, videos = sample
    order = np.random.default_rng(1).permutation(len(scenes))
    scores = scores_of([scenes[i] for i in order], videos)
    assert scores["motion"] < 0.25  # chance is 1 in 11
    assert scores["color"] < 0.35 and scores["background"] < 0.38 and scores["shape"] < 0.5
    assert scores["all"] < 0.05


def test_no_object_in_blank_or_noise():
    rng = np.random.default_rng(0)
    shape = (17, 64, 64, 3)
    pictures = {
        "blank": np.full(shape, 90, np.uint8),
        "noise": rng.integers(0, 256, shape, np.uint8),
        "still noise": np.repeat(rng.integers(0, 256, (1, *shape[1:]), np.uint8), 17, axis=0),
        "grain": to_uint8(128 + rng.normal(0, 20, shape)),
        "coarse noise": np.kron(rng.integers(0, 256, (17, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8),
        "ramp": np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 3, shape),
    }
    for name, video in pictures.items():
        verdict = judge.judge(video)
        assert (verdict.color, verdict.motion, verdict.shape, verdict.size_change) == ("none",) * 4, name
    assert judge.judge(np.full(shape, (30, 60, 220), np.uint8)).background == "blue"


def test_an_object_that_jumps_or_comes_and_goes_has_no_motion():
    scene = clips.Scene("circle", "red", "blue", "right")
    video = clips.draw(scene, np.random.default_rng(0))
    jump = np.concatenate([np.repeat(video[:1], 9, axis=0), np.repeat(video[-1:], 8, axis=0)])
    assert judge.judge(jump).motion == "unclear"
    gone = video.copy()
    gone[8:] = gone[0, 0, 0]
    assert judge.judge(gone).motion == "none"
    half = clips.draw(scene, np.random.default_rng(0), frames=7)  # 6/16 of the way, neither still nor a move
    assert judge.judge(half).motion == "unclear"


def test_several_objects_are_not_one():
    small = clips.draw(clips.Scene("circle", "red", "blue", "still"), np.random.default_rng(0), size=32)
    assert judge.judge(np.tile(small, (1, 2, 2, 1))).color == "none"


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="float32"):
        judge.judge(np.zeros((17, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="2 scenes and 0 verdicts"):
        judge.score(clips.all_scenes()[:2], [])


def test_score_counts_each_attribute():
    asked = clips.Scene("circle", "red", "blue", "left")
    right = judge.Verdict("red", "blue", "left", "circle", "constant")
    wrong = judge.Verdict("green", "blue", "right", "square", "growing")
    scores = judge.score([asked] * 4, [right, right, right, wrong])
    assert (
        scores["color"]
        == scores["motion"]
        == scores["shape"]
        == scores["size_change"]
        == scores["all"]
        == 0.75
    )
    assert scores["background"] == 1.0
    assert scores["per_motion"] == {"left": {"n": 4, "accuracy": 0.75, "read_as": {"left": 3, "right": 1}}}
    assert "right 1" in judge.table(scores)


def test_chosen_scenes_are_balanced_and_repeatable():
    scenes = judge.choose_scenes(100, seed=7)
    assert scenes == judge.choose_scenes(100, seed=7) != judge.choose_scenes(100, seed=8)
    assert all(sum(s.motion == m for s in scenes) == 20 for m in clips.CORE_MOTIONS)
    assert len(set(scenes)) == 45  # all held-out combinations of the five motions


def test_contact_sheet_shows_the_frames():
    videos = np.stack([np.full((17, 64, 64, 3), shade, np.uint8) for shade in (40, 160)])
    picture = np.asarray(sheet.contact_sheet(videos, ["one", "two"], columns=3, zoom=1, notes=["", "left"]))
    assert {tuple(picture[y, x]) for y in (30, 100) for x in (-30, -100)} == {(40, 40, 40), (160, 160, 160)}
    assert (picture[:, :170] == (200, 0, 0)).all(-1).any()  # the note is red


class DrawingPipeline:
    """Stands in for a checkpoint: draws what the prompt says, and anything at all without a prompt.

    Given frames are put in their places, the last one darker by 10.
    """

    preset = SimpleNamespace(height=64)

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.scenes = {
            clips.canonical(scene): scene
            for split in ("train", "held_out")
            for scene in clips.all_scenes(split)
        }

    @classmethod
    def from_pretrained(cls, path, dtype):
        assert path == "the embedded one"
        return cls()

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, prompt, seed, num_inference_steps=8, image=None, last_image=None):
        anything = list(self.scenes.values())
        asked = [self.scenes.get(p) or anything[self.rng.integers(len(anything))] for p in prompt]
        videos = [clips.draw(scene, self.rng) for scene in asked]
        for i, video in enumerate(videos):
            if image is not None:
                video[0] = image[i]
            if last_image is not None:
                video[-1] = np.maximum(last_image[i], 10) - 10
        return SimpleNamespace(as_uint8=lambda: videos)


@pytest.fixture
def run_judge(tmp_path, monkeypatch):
    """Run the command line with the stand-in, and return its report."""
    stand_in = SimpleNamespace(
        WanT2VPipeline=DrawingPipeline,
        WanI2VPipeline=DrawingPipeline,
        tiny_checkpoint=lambda task: "the embedded one",
    )
    monkeypatch.setitem(sys.modules, "wan22", stand_in)

    def run(*flags):
        command = ["judge.py", "--batch", "7", "--steps", "3", "--out", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", command)
        judge.main()
        return json.loads((tmp_path / "scores.json").read_text())

    return run


@pytest.mark.parametrize("flags", [[], ["--no-prompt"]])
def test_command_line(tmp_path, run_judge, capsys, flags):
    report = run_judge("--prompts", "25", *flags)
    assert report["n"] == len(report["clips"]) == 25
    assert report["motion"] < 0.4 if flags else report["all"] == 1.0
    assert report["given"] == {}
    assert Image.open(tmp_path / "sheet.png").height > 20 * 128
    assert "25/25 videos" in capsys.readouterr().out


def test_command_line_with_images(run_judge, capsys):
    report = run_judge("--prompts", "10", "--task", "i2v")
    assert report["given"] == {
        "image": {"mean": pytest.approx(54.15, abs=0.01), "lowest": report["given"]["image"]["mean"]}
    }
    given = run_judge("--prompts", "10", "--task", "i2v", "--last")["given"]
    assert 28 < given["last_image"]["lowest"] <= given["last_image"]["mean"] < 32  # 28.1 for 10 everywhere
    assert "last_image" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_judge("--last")
    assert "--last needs --task i2v" in capsys.readouterr().err


def test_given_frames_are_of_the_scenes():
    scenes = judge.choose_scenes(5, seed=3)
    given = judge.given_frames(scenes, 3, 128, last=True)
    assert {name: frames.shape for name, frames in given.items()} == dict.fromkeys(
        ("image", "last_image"), (5, 128, 128, 3)
    )
    for i, scene in enumerate(scenes):
        same = np.array_equal(given["image"][i], given["last_image"][i])
        assert same == (scene.motion == "still")
