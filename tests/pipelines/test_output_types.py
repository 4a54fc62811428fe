"""The types that a call's frames come in."""

import copy

import numpy as np
import torch

from tests.builders import SMALL, latents_of, random_pipeline
from wan22.video.result import to_uint8


def test_np(pipe):
    frames = pipe("a", seed=0, **SMALL).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    assert frames.dtype == np.float32
    assert 0 <= frames.min() < frames.max() <= 1
    assert frames.std() > 0.05


def test_np_is_the_vaes_video(pipe):
    latents = latents_of(pipe)
    video = pipe.vae.decode(pipe.vae.denormalize_latents(latents)).sample.detach()  # b c t h w in [-1, 1]
    expected = (video.permute(0, 2, 3, 4, 1) / 2 + 0.5).numpy()
    assert np.allclose(pipe("a red circle", seed=7, **SMALL).frames, expected, atol=1e-6)


def test_pt(pipe):
    frames = pipe("a", seed=0, output_type="pt", **SMALL).frames
    assert isinstance(frames, torch.Tensor)
    assert frames.shape == (1, 5, 3, 32, 32)
    assert np.array_equal(frames.permute(0, 1, 3, 4, 2).numpy(), pipe("a", seed=0, **SMALL).frames)


def test_pil(pipe):
    frames = pipe(["a", "b"], seed=0, output_type="pil", **SMALL).frames
    assert [len(video) for video in frames] == [5, 5]
    arrays = pipe(["a", "b"], seed=0, **SMALL).frames
    expected = np.floor(arrays.astype(np.float64) * 255)
    assert np.abs(np.stack([np.asarray(f) for f in frames[1]]) - expected[1]).max() <= 1
    assert np.array_equal(np.asarray(frames[0][3]), to_uint8(arrays[0, 3]))
    assert frames[0][0].size == (32, 32)
    assert frames[0][0].mode == "RGB"


def test_uint8_is_truncated():
    values = np.array([-0.1, 0.0, 0.9999 / 255, 1 / 255, 127.9 / 255, 0.99999, 1.0, 1.5], dtype=np.float32)
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 127, 254, 255, 255]


def test_latent(pipe):
    video = pipe("a", seed=0, output_type="latent", **SMALL)
    assert video.frames.shape == (1, 16, 2, 4, 4)
    for output_type in ("np", "pt"):
        decoded = pipe.decode(video.frames, output_type)
        assert np.array_equal(
            np.asarray(decoded), np.asarray(pipe("a", seed=0, output_type=output_type, **SMALL).frames)
        )


def test_return_dict(pipe):
    (frames,) = pipe("a", seed=0, return_dict=False, **SMALL)
    assert np.array_equal(frames, pipe("a", seed=0, **SMALL).frames)


def test_the_vae_may_run_in_another_dtype(pipe):
    frames = random_pipeline(vae=copy.deepcopy(pipe.vae).to(torch.bfloat16))("a", seed=0, **SMALL).frames
    assert frames.dtype == np.float32
    assert 0 < np.abs(frames - pipe("a", seed=0, **SMALL).frames).mean() < 0.02
