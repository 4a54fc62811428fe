"""The embedded checkpoints for image to video, judged by what is seen in their videos."""

import functools

import clips
import judge
import numpy as np
import pytest
import torch

from tests.tiers import slow
from wan22 import WanI2VPipeline, WanT2VPipeline, tiny_checkpoint

SHARED = {"i2v": {"text_encoder", "tokenizer", "vae"}, "ti2v": {"tokenizer"}}
SCENES = judge.choose_scenes(10, 0, "held_out", clips.CORE_MOTIONS)


@functools.cache
def load(name, pipeline=WanI2VPipeline):
    pipe = pipeline.from_pretrained(tiny_checkpoint(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["i2v", *slow(["ti2v"])])
def pipe(request):
    return load(request.param)


@functools.cache
def made(pipe, last=False):
    """Return videos of held-out scenes, their scores, and how well they keep the given frames."""
    given = judge.given_frames(SCENES, 0, pipe.preset.height, last)
    prompts = [clips.canonical(scene) for scene in SCENES]
    videos = judge.generate(pipe, prompts, 0, len(SCENES), None, given)
    scores = judge.score(SCENES, [judge.judge(video) for video in videos])
    return videos, scores, judge.fidelity(videos, given)


def test_videos_go_on_from_the_image_as_the_prompt_says(pipe):
    _, scores, given = made(pipe)
    assert given["image"]["mean"] >= 28
    assert scores["color"] >= 0.9
    assert scores["background"] >= 0.9
    assert scores["motion"] >= 0.8


@pytest.mark.slow
def test_the_prompt_decides_the_motion(pipe):
    """One image, five prompts."""
    image = judge.given_frames(SCENES[4:5], 0, pipe.preset.height, False)["image"][0]
    scenes = [
        clips.Scene(SCENES[4].shape, SCENES[4].color, SCENES[4].background, m) for m in clips.CORE_MOTIONS
    ]
    videos = pipe(image, [clips.canonical(scene) for scene in scenes], seed=0).as_uint8()
    read = [judge.judge(video).motion for video in videos]
    assert len(set(read)) >= 4, read


def centre(frame):
    """Return the object's centroid in pixels, x and y."""
    frame = frame.astype(float)
    border = np.median(np.concatenate((frame[:2].reshape(-1, 3), frame[-2:].reshape(-1, 3))), axis=0)
    contrast = np.linalg.norm(frame - border, axis=-1)
    y, x = np.nonzero(contrast > 0.5 * contrast.max())
    return np.array([x.mean(), y.mean()])


def test_videos_arrive_at_the_last_image():
    pipe = load("i2v")
    videos, scores, given = made(pipe, last=True)
    assert given["image"]["mean"] >= 27.5
    assert given["last_image"]["mean"] >= 25
    assert scores["motion"] >= 0.8
    without, *_ = made(pipe)
    last = judge.given_frames(SCENES, 0, 64, True)["last_image"]
    moving = [i for i, scene in enumerate(SCENES) if scene.motion != "still"]
    off, off_without = (
        np.mean([np.linalg.norm(centre(frames[i, -1]) - centre(last[i])) for i in moving])
        for frames in (videos, without)
    )
    assert off <= 2, "pixels, of 64"
    assert off <= 0.7 * off_without


@pytest.mark.slow
def test_text_alone_makes_videos_too():
    """TI2V-5B serves both tasks."""
    pipe = load("ti2v", WanT2VPipeline)
    prompts = [clips.canonical(scene) for scene in SCENES]
    scores = judge.score(
        SCENES, [judge.judge(v) for v in judge.generate(pipe, prompts, 0, len(SCENES), None)]
    )
    assert scores["color"] >= 0.9
    assert scores["background"] >= 0.9
    assert scores["motion"] >= 0.7


def test_a_video_is_the_same_alone_and_in_a_batch(pipe):
    images = judge.given_frames(SCENES[:2], 0, pipe.preset.height, False)["image"]
    prompts = [clips.canonical(scene) for scene in SCENES[:2]]
    options = {"num_inference_steps": 2, "output_type": "pt"}
    both = pipe(list(images), prompts, seed=[5, 6], **options).frames
    for i in range(2):
        assert torch.equal(pipe(images[i], prompts[i], seed=5 + i, **options).frames[0], both[i])


@pytest.mark.parametrize(("name", "boundary", "size"), [("i2v", 0.9, 64), ("ti2v", None, 128)])
def test_the_recipe_is_the_presets(name, boundary, size):
    image = np.zeros((size, size, 3), np.uint8)
    video = load(name)(image, "a red circle", seed=0, num_inference_steps=1)
    assert video.recipe.checkpoint == f"tiny-{name}"
    assert video.recipe.boundary_ratio == boundary
    assert video.frames.shape == (1, 17, size, size, 3)


@pytest.mark.parametrize("name", SHARED)
def test_components_are_those_of_text_to_video(name):
    pipe, base = load(name), load("t2v", WanT2VPipeline)
    for component in SHARED[name] - {"tokenizer"}:
        own, other = (getattr(p, component).state_dict() for p in (pipe, base))
        assert all(torch.equal(own[key], other[key]) for key in other)
    assert pipe.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_all_together_are_small():
    """Beside what they have in common with text to video."""
    files = [
        file
        for name, shared in SHARED.items()
        for file in tiny_checkpoint(name).rglob("*")
        if file.is_file() and file.parent.name not in shared
    ]
    assert sum(file.stat().st_size for file in files) <= 20e6
