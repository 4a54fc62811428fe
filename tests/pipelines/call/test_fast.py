"""One word for how much faster."""

import logging

import pytest
import torch

from tests.builders import SMALL, random_pipeline
from wan22.pipelines.call.fast import FAST

CALL = {**SMALL, "num_inference_steps": 12, "seed": 7, "output_type": "latent"}


@pytest.mark.parametrize("word", FAST)
def test_it_is_what_it_says_to_be(word, caplog):
    pipe = random_pipeline()
    with caplog.at_level(logging.INFO, logger="wan22"):
        video = pipe("a", fast=word, **CALL)
    ((name, value),) = FAST[word].arguments.items()
    assert f"fast='{word}' is {name}='{value}': on the miniature" in caplog.text
    assert torch.equal(video.frames, pipe("a", **CALL, **FAST[word].arguments).frames)
    assert video.recipe.call["fast"] is None and video.recipe.cache["method"] == value.partition(":")[0]
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


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
