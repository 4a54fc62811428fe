"""Schedules of sizes that are refused, by name."""

import copy
import json

import diffusers
import pytest

from tests.builders import random_pipeline
from tests.pipelines.call.test_resolution import HALF, call
from wan22.pipelines.call.resolution import SCHEDULES, read_resolution_schedule
from wan22.video.recipe import Recipe


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("small", "resolution_schedule='small' must be"),
        ("[[0.75", "must be a name, or JSON"),
        ("[" * 10**5, "must be a name, or JSON"),
        ([], r"must be pairs \(scale, until\)"),
        (0.75, r"must be pairs \(scale, until\)"),
        ({"scale": 0.75}, r"must be pairs \(scale, until\)"),
        (b"ab", r"must be pairs \(scale, until\)"),
        ([(0.75, 0.5)] * 10**4, r"must be pairs \(scale, until\)"),
        ([0.75, 0.5], r"resolution_schedule\[0\]=0.75 must be a pair"),
        ([(0.75,)], "must be a pair"),
        (["ab"], "must be a pair"),
        ([("a", 0.5)], r"resolution_schedule\[0\]\[0\]='a' must be"),
        ([(True, 0.5)], r"resolution_schedule\[0\]\[0\]"),
        ([(float("nan"), 0.5)], r"resolution_schedule\[0\]\[0\]"),
        ([(0.2, 0.5)], r"\[0\]\[0\]=0.2 must be .*0.25"),
        ([(1.5, 0.5)], r"\[0\]\[0\]=1.5 must be .*at most 1"),
        ([(0.5, 0)], r"\[0\]\[1\]=0 must be .*above 0"),
        ([(0.5, 1)], r"\[0\]\[1\]=1 leaves no step at full size"),
        ([(0.5, 1.0)], "leaves no step at full size"),
        ([(0.5, 0.5), (0.75, 0.5)], r"\[1\]\[1\]=0.5 must lie above 0.5"),
        ([(0.5, 0.01)], "the part at 48x32 until 0.01 has none of the 8 steps"),
        ([(0.5, 0.99)], "the part at 96x64 until 1 has none of the 8 steps"),
        ([(0.95, 0.5)], "0.95 of 96x64, in tokens of 16x16 pixels, is 96x64 again"),
    ],
)
def test_values_that_are_refused(value, told):
    with pytest.raises(ValueError, match=told) as error:
        call(random_pipeline(), resolution_schedule=value)
    assert len(str(error.value)) < 500


def test_a_size_of_no_token():
    with pytest.raises(ValueError, match="is 32x0; give a larger scale"):
        call(random_pipeline(), width=128, height=16, resolution_schedule=[(0.25, 0.5)])


def test_what_does_not_go_together():
    pipe = random_pipeline()
    shift = {"num_inference_steps": None, "flow_shift": None}
    with pytest.raises(ValueError, match="resolution_schedule= and distilled="):
        call(pipe, **shift, distilled="lightning-4", resolution_schedule=HALF)
    with pytest.raises(
        ValueError, match="resolution_schedule= raises the shift, and sigmas are used as they"
    ):
        call(pipe, **shift, sigmas=[1.0, 0.5], resolution_schedule=HALF)
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler does so twice"):
        call(random_pipeline(scheduler=heun), resolution_schedule=HALF)
    theirs = copy.deepcopy(pipe.transformer)
    theirs.enable_cache(diffusers.FirstBlockCacheConfig(0.1))
    with pytest.raises(ValueError, match=r"a step cache of diffusers in the model.*disable_cache"):
        call(random_pipeline(transformer=theirs), resolution_schedule=HALF)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("resolution_schedule", "u"),
        ("resolution_schedule", [0.75, 0.5]),
        ("resolution_schedule", [["a", 0.5]]),
        ("sizes", [[48, 48]]),
        ("sizes", [[48, 48, -1]]),
    ],
)
def test_recipes_that_hold_something_else(entry, value):
    recipe = call(random_pipeline(), resolution_schedule=HALF).recipe
    values = json.loads(recipe.to_json())
    (values if entry == "sizes" else values["call"])[entry] = value
    with pytest.raises(ValueError, match=f"{entry}.* must be"):
        Recipe.from_json(json.dumps(values))


def test_names_are_what_they_say():
    assert read_resolution_schedule("u") == SCHEDULES["u"] == ((1.0, 0.25), (0.75, 0.875))
    assert read_resolution_schedule(None) is None
