"""The generator: deterministic, inside the frame, true to its captions, with an honest hold-out."""

from dataclasses import fields

import clips
import numpy as np
import pytest

EVERY_SCENE = clips.all_scenes("train") + clips.all_scenes("held_out")


def test_splits_are_disjoint_and_complete():
    train, held_out = set(clips.all_scenes("train")), set(clips.all_scenes("held_out"))
    assert not train & held_out
    assert 0.10 <= len(held_out) / (len(train) + len(held_out)) <= 0.12
    assert len(train) + len(held_out) == 3 * (6 * 5 - 3) * 11
    assert all(scene.color != scene.background for scene in train | held_out)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_value_of_every_attribute_is_in_each_split(split):
    scenes = clips.all_scenes(split)
    values = {
        "shape": clips.SHAPES,
        "color": clips.COLORS,
        "background": clips.BACKGROUNDS,
        "motion": clips.MOTIONS,
    }
    for field in fields(clips.Scene):
        assert {getattr(scene, field.name) for scene in scenes} == set(values[field.name])


def test_every_pair_of_values_of_a_held_out_scene_was_seen_in_training():
    train = clips.all_scenes("train")
    for scene in clips.all_scenes("held_out"):
        assert any((s.color, s.background) == (scene.color, scene.background) for s in train)
        assert any((s.shape, s.color, s.motion) == (scene.shape, scene.color, scene.motion) for s in train)
        assert any(
            (s.shape, s.background, s.motion) == (scene.shape, scene.background, scene.motion) for s in train
        )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'test'"):
        clips.all_scenes("test")
    with pytest.raises(ValueError, match="'star'"):
        clips.signed_distance("star", np.ones((1, 3), np.float32), 64)


def test_same_seed_same_batch():
    first, again, other = (clips.draw_batch(np.random.default_rng(seed), 6) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
    assert not np.array_equal(first[0], other[0])


def test_batch_has_the_stated_form():
    video, captions, scenes = clips.draw_batch(
        np.random.default_rng(0), 5, split="held_out", motions=["up", "still"]
    )
    assert video.shape == (5, 17, 64, 64, 3) and video.dtype == np.uint8
    assert len(captions) == len(scenes) == 5
    assert set(scenes) <= set(clips.all_scenes("held_out"))
    assert {scene.motion for scene in scenes} <= {"up", "still"}


def test_weights_decide_how_often_a_motion_comes():
    scenes = clips.sample_scenes(np.random.default_rng(0), 3000)
    share = {m: np.mean([scene.motion == m for scene in scenes]) for m in clips.MOTIONS}
    total = sum(clips.MOTION_WEIGHTS.values())
    for motion, weight in clips.MOTION_WEIGHTS.items():
        assert share[motion] == pytest.approx(weight / total, abs=0.03)


@pytest.mark.parametrize("scene", EVERY_SCENE[::27], ids=clips.canonical)
def test_objects_stay_inside_and_colours_are_exact(scene):
    rng = np.random.default_rng(5)
    for _ in range(8):
        frames = clips.draw(scene, rng)
        edge = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        assert (edge == clips.BACKGROUNDS[scene.background]).all()
        assert (frames == clips.COLORS[scene.color]).all(-1).sum((1, 2)).min() >= 20


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_paths_move_as_named_at_constant_speed(motion):
    rng = np.random.default_rng(1)
    for _ in range(50):
        track = clips.path(motion, rng)
        steps = np.diff(track, axis=0)
        assert np.allclose(steps, steps[0])
        way = track[-1] - track[0]
        dx = ("right" in motion) - ("left" in motion)  # x points right and y points down
        dy = ("down" in motion) - ("up" in motion)
        assert (np.sign(way[:2].round(6)) == (dx, dy)).all()
        assert np.all((abs(way[:2]) >= 18) | (way[:2] == 0))
        assert np.sign(way[2]) == {"growing": 1, "shrinking": -1}.get(motion, 0)


def test_starts_are_spread_over_the_frame():
    rng = np.random.default_rng(2)
    starts = np.array([clips.path("right", rng)[0] for _ in range(500)])
    assert np.ptp(starts[:, 0]) > 15 and np.ptp(starts[:, 1]) > 35
    assert np.std(starts[:, 1]) > 9  # uniform, not gathered about the middle


def test_short_clips_are_windows_of_long_ones():
    rng = np.random.default_rng(6)
    speed = [abs(np.diff(clips.path("left", rng, frames=5)[:, 0])).mean() for _ in range(50)]
    assert clips.TRAVEL[0] / 16 <= min(speed) and max(speed) <= clips.TRAVEL[1] / 16
    frames, _, _ = clips.draw_batch(rng, 2, frames=1, size=32)
    assert frames.shape == (2, 1, 32, 32, 3)


def test_size_scales_the_picture():
    scene = clips.Scene("square", "red", "blue", "up")
    small, large = (clips.draw(scene, np.random.default_rng(0), size=size) for size in (64, 128))
    halved = large.reshape(17, 64, 2, 64, 2, 3).mean((2, 4))
    assert abs(halved - small).mean() < 2


def test_canonical_captions():
    assert clips.canonical(clips.Scene("circle", "red", "blue", "right")) == (
        "a red circle moves to the right on a blue background"
    )
    assert clips.canonical(clips.Scene("circle", "red", "blue", "still")) == (
        "a red circle stays still on a blue background"
    )
    assert clips.canonical(clips.Scene("square", "white", "gray", "up-left")) == (
        "a white square moves up and to the left on a gray background"
    )
    assert clips.canonical(clips.Scene("square", "white", "gray", "growing")) == (
        "a white square grows on a gray background"
    )
    assert len({clips.canonical(scene) for scene in EVERY_SCENE}) == len(EVERY_SCENE)


def test_phrasings_vary_and_never_mean_two_scenes():
    rng = np.random.default_rng(0)
    meaning: dict[str, clips.Scene] = {}
    for scene in EVERY_SCENE:
        phrasings = {clips.caption(scene, rng) for _ in range(40)}
        assert len(phrasings) >= 6
        for text in phrasings:
            assert meaning.setdefault(text, scene) == scene
