"""One word for how much faster."""

import logging

import pytest
import torch
from PIL import Image

from tests.builders import SMALL, random_pipeline
from wan22 import EasyCache, WanI2VPipeline, WanT2VPipeline, tiny_checkpoint
from wan22.pipelines.call.fast import MEASURED, PUBLISHED

CALL = {**SMALL, "num_inference_steps": 12, "seed": 7, "output_type": "latent"}


@pytest.mark.parametrize("word", PUBLISHED)
def test_of_a_checkpoint_on_which_nothing_was_measured(word, caplog):
    pipe, cache = random_pipeline(), EasyCache(PUBLISHED[word])
    with caplog.at_level(logging.INFO, logger="wan22"):
        video = pipe("a", fast=word, **CALL)
    assert f"fast='{word}' is {cache}: its authors' setting" in caplog.text
    assert torch.equal(video.frames, pipe("a", **CALL, cache=cache).frames)
    assert video.recipe.call["fast"] is None and video.recipe.cache["method"] == "easy"
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_of_the_miniatures(task, caplog):
    """Each says what was measured on it, and a prompt comes near to that."""
    cls = WanI2VPipeline if task == "i2v" else WanT2VPipeline
    pipe = cls.from_pretrained(tiny_checkpoint(task), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle moves to the right on a blue background"
    image = {"image": Image.new("RGB", (64, 64), "blue")} if task == "i2v" else {}
    fewer, psnr = MEASURED[f"tiny-{task}"]["medium"]
    with caplog.at_level(logging.INFO, logger="wan22"):
        video = pipe(prompt=prompt, seed=1, fast="medium", output_type="latent", **image)
    assert f"fast='medium' is {EasyCache.preset('medium')}: {fewer:g} times fewer passes" in caplog.text
    assert f"at a PSNR of {psnr:.0f} dB" in caplog.text
    ((computed, of),) = video.recipe.passes
    assert of == 40 and 0.75 * fewer <= of / computed <= 1.25 * fewer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fast": "fastest"}, "fast='fastest' must be one of 'low', 'medium', 'high'"),
        ({"fast": "low", "cache": "easy"}, "fast='low' picks a step cache; leave out it, or cache"),
        (
            {"fast": "low", "distilled": "lightning-4", "num_inference_steps": None, "flow_shift": None},
            "leave out it, or distilled",
        ),
        ({"fast": "low", "num_inference_steps": 4}, "at least 8 steps"),
    ],
    ids=range(4),
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_pipeline()("a", **{**CALL, **arguments})
