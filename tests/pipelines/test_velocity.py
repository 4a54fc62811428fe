"""Guidance over a batch: each video goes through the transformer by itself."""

import torch

from tests.builders import SMALL, latents_of, random_i2v_pipeline, random_pipeline


def test_videos_of_a_batch_are_what_they_are_alone():
    together = latents_of(random_pipeline(), ["a", "b"], num_videos_per_prompt=2)
    assert torch.equal(together[3:], latents_of(random_pipeline(), "b", seed=10))


def test_videos_of_several_images_are_what_they_are_alone():
    torch.manual_seed(0)
    images = [torch.rand(3, 32, 32) for _ in range(2)]
    arguments = {**SMALL, "seed": 7, "output_type": "latent"}
    del arguments["guidance_scale_2"]
    pipe = random_i2v_pipeline(1)
    together = pipe(images, "a", **arguments).frames
    assert torch.equal(together[1:], pipe(images[1], "a", **arguments | {"seed": 8}).frames)
