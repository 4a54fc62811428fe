"""Sampling loops of the caller's own, written for diffusers: its own call runs on our pipelines."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.builders import random_i2v_pipeline, random_pipeline, random_ti2v_pipeline
from wan22 import WanI2VPipeline, WanT2VPipeline

T2V = {
    "t2v": random_pipeline,
    "single": lambda: random_pipeline(experts=1),
    "ti2v": lambda: random_pipeline(experts=1, channels=48),
}
I2V = {
    "i2v": random_i2v_pipeline,
    "ti2v": random_ti2v_pipeline,
    "clip": lambda: random_i2v_pipeline(experts=1),
    "flf": lambda: random_i2v_pipeline(experts=1, two_frames=True),
}
CLASSES = [
    (WanT2VPipeline, diffusers.WanPipeline),
    (WanI2VPipeline, diffusers.WanImageToVideoPipeline),
]


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def arguments_for(pipe, **more):
    """The arguments of a call, with a generator of its own."""
    two = {"guidance_scale_2": 2.0} if pipe.config.boundary_ratio is not None else {}
    sizes = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}
    texts = {"prompt": "a red circle", "negative_prompt": "fog", "max_sequence_length": 512}
    return {**sizes, **texts, **two, **more, "generator": torch.Generator().manual_seed(4)}


@pytest.mark.parametrize("form", T2V)
def test_their_call_on_our_text_to_video_pipeline(form):
    pipe = T2V[form]()
    theirs = diffusers.WanPipeline.__call__(pipe, **arguments_for(pipe)).frames
    assert np.abs(theirs - pipe(**arguments_for(pipe)).frames).max() <= 1e-5


@pytest.mark.parametrize("form", I2V)
def test_their_call_on_our_image_to_video_pipeline(form):
    pipe = I2V[form]()
    more = {"image": picture()} | ({"last_image": picture(1)} if form == "flf" else {})
    theirs = diffusers.WanImageToVideoPipeline.__call__(pipe, **arguments_for(pipe, **more)).frames
    assert np.abs(theirs - pipe(**arguments_for(pipe, **more)).frames).max() <= 1e-5


def test_a_callback_in_their_call(pipe):
    """Which reads and sets the same attributes as in ours."""
    seen = []

    def callback(caller, step, timestep, tensors):
        seen.append((caller.num_timesteps, caller.do_classifier_free_guidance, caller.guidance_scale))
        caller._guidance_scale = 0.0
        caller._interrupt = step == 1
        return tensors

    diffusers.WanPipeline.__call__(pipe, **arguments_for(pipe, callback_on_step_end=callback))
    assert seen == [(3, True, 3.0), (3, False, 0.0)]
    assert pipe.interrupt and pipe.current_timestep is None
    pipe(**arguments_for(pipe))
    assert (pipe.interrupt, pipe.guidance_scale, pipe.do_classifier_free_guidance) == (False, 3.0, True)


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_methods_take_what_theirs_take(ours, theirs):
    for name in ("prepare_latents", "check_inputs", "encode_prompt"):
        parameters = [list(inspect.signature(getattr(cls, name)).parameters) for cls in (ours, theirs)]
        assert parameters[0] == parameters[1], name
    for name in ("guidance_scale", "num_timesteps", "attention_kwargs", "interrupt", "current_timestep"):
        assert isinstance(getattr(ours, name), property)


@pytest.mark.parametrize("generator", [None, "one", "each"])
def test_prepare_latents(pipe, generator):
    theirs = diffusers.WanPipeline(**pipe.components)

    def prepared(by):
        torch.manual_seed(5)
        seeded = [torch.Generator().manual_seed(s) for s in (1, 2)]
        given = {None: None, "one": seeded[0], "each": seeded}[generator]
        return by.prepare_latents(2, 16, 32, 48, 9, torch.float32, "cpu", given)

    assert prepared(pipe).shape == (2, 16, 3, 4, 6)
    if generator is None:  # diffusers draws the noise itself there, we a seed
        assert torch.equal(prepared(pipe), prepared(pipe)) and prepared(pipe).std() > 0.9
    else:
        assert torch.equal(prepared(pipe), prepared(theirs))
    given = torch.ones(1, 16, 3, 4, 6)
    assert torch.equal(pipe.prepare_latents(1, latents=given, dtype=torch.bfloat16), given.bfloat16())


def test_prepare_latents_of_images():
    """One image for all videos, and one for each."""
    pipe = random_i2v_pipeline()
    theirs = diffusers.WanImageToVideoPipeline(**pipe.components)
    pixels = torch.cat([pipe.video_processor.preprocess(picture(s), 64, 64) for s in (0, 1)])
    alone = []
    for image in pixels.split(1):
        arguments = image, 1, 16, 64, 64, 9, torch.float32, "cpu"
        mine, expected = (
            by.prepare_latents(*arguments, torch.Generator().manual_seed(1), last_image=pixels[1:])
            for by in (pipe, theirs)
        )
        assert torch.equal(mine[0], expected[0])
        assert torch.allclose(mine[1], expected[1], atol=1e-5) and mine[1].shape == (1, 20, 3, 8, 8)
        alone.append(mine[1])
    both = pipe.prepare_latents(pixels, 2, height=64, width=64, num_frames=9, last_image=pixels[1:])
    assert torch.equal(both[1], torch.cat(alone))
    with pytest.raises(ValueError, match=r"image has shape \(2, 3, 64, 64\); it must be .* each of 3 videos"):
        pipe.prepare_latents(pixels, 3, height=64, width=64, num_frames=9)
    with pytest.raises(ValueError, match="height=60 must be"):
        pipe.prepare_latents(pixels, 2, height=60, width=64, num_frames=9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": 100}, "height=100 must be"),
        ({"prompt": None}, "prompt or prompt_embeds"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries"),
        ({"prompt_embeds": torch.zeros(1, 4, 32)}, "only one of them"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise' must be one of"),
        ({"guidance_scale_2": 0.5}, "guidance_scale_2=0.5"),
    ],
)
def test_check_inputs(changed, message, pipe):
    arguments = {"prompt": "a", "negative_prompt": None, "height": 32, "width": 32}
    assert pipe.check_inputs(**arguments) is None
    with pytest.raises(ValueError, match=message):
        pipe.check_inputs(**arguments | changed)
    i2v = random_i2v_pipeline()
    assert i2v.check_inputs(**arguments, image=picture()) is None
    with pytest.raises(ValueError, match=message):
        i2v.check_inputs(**arguments | changed, image=picture())


def test_frames_by_the_video_processor(pipe):
    """As loops turn what the VAE decodes into frames."""
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    frames = pipe.video_processor.postprocess_video(video, output_type="np")
    assert (
        frames.shape == (1, 5, 32, 32, 3)
        and np.abs(frames[0, 0, 0, 0] - (video[0, :, 0, 0, 0].numpy() / 2 + 0.5)).max() < 1e-6
    )
    assert pipe.video_processor.preprocess(picture(), height=32, width=48).shape == (1, 3, 32, 48)
    assert random_ti2v_pipeline().video_processor.config.vae_scale_factor == 16
