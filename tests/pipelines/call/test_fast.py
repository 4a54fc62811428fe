"""One word for how much faster."""

import logging

import pytest
import torch

from tests.builders import SMALL, random_pipeline
from wan22 import EasyCache, WanT2VPipeline, tiny_checkpoint
from wan22.pipelines.call.fast import MEASURED, PUBLISHED

CALL = {**SMALL, "num_inference_steps": 12, "seed": 7, "output_type": "latent"}


@pytest.mark.parametrize("word", MEASURED)
def test_of_a_checkpoint_on_which_nothing_was_measured(word, caplog):
    pipe, cache = random_pipeline(), EasyCache(PUBLISHED[word])
    with caplog.at_level(logging.INFO, logger="wan22"):
        video = pipe("a", fast=word, **CALL)
    assert f"fast='{word}' is {cache}: its authors' setting" in caplog.text
    assert torch.equal(video.frames, pipe("a", **CALL, cache=cache).frames)
    assert video.recipe.call["fast"] is None and video.recipe.cache["method"] == "easy"
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_of_the_miniature(caplog):
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"))
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle moves to the right on a blue background"
    with caplog.at_level(logging.INFO, logger="wan22"):
        video = pipe(prompt, seed=1, fast="medium")
    assert f"fast='medium' is {EasyCache.preset('medium')}: 2.22 times fewer passes" in caplog.text
    ((computed, of),) = video.recipe.passes
    assert of == 40 and 1.8 <= of / computed <= 2.6


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
