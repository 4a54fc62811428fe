"""Guidance, and what the calls of one run share."""

import copy

import pytest
import torch

from tests.builders import (
    SMALL,
    latents_of,
    random_components,
    random_i2v_pipeline,
    random_pipeline,
    random_ti2v_pipeline,
)
from tests.golden_data import relative_error
from wan22.pipelines import velocity
from wan22.pipelines.velocity import Velocity, merge_zero_rows


def forgets(**_):
    """In the place of the pipelines' Velocity, one that keeps nothing."""
    return Velocity(keep=False)


@pytest.fixture
def forgetful(monkeypatch):
    """Nothing is kept from call to call, and no rows are merged."""
    monkeypatch.setattr("wan22.pipelines.base.Velocity", forgets)
    monkeypatch.setattr(velocity, "merge_zero_rows", lambda rows: (rows, None))


@pytest.fixture(params=["t2v", "i2v", "2.1-i2v", "ti2v"])
def run(request):
    """A run of each form of checkpoint, two videos at once."""
    torch.manual_seed(0)
    image = torch.rand(3, 32, 32)
    if request.param == "t2v":
        return lambda: latents_of(random_pipeline(), ["a", "something else"])
    make = {
        "i2v": random_i2v_pipeline,
        "2.1-i2v": lambda: random_i2v_pipeline(1),
        "ti2v": random_ti2v_pipeline,
    }[request.param]

    def frames():
        pipe = make()
        arguments = {**SMALL, "height": 32, "width": 32, "seed": 7, "output_type": "latent"}
        if pipe.config.boundary_ratio is None:
            arguments.pop("guidance_scale_2", None)
        return pipe(image, ["a", "something else"], **arguments).frames

    return frames


def test_what_is_kept_changes_nothing_beyond_rounding(run, request):
    kept = run()
    request.getfixturevalue("forgetful")
    assert relative_error(kept, run()) <= 2e-6


def test_videos_of_one_prompt_share_what_is_kept(monkeypatch):
    """And are what they are alone; videos of other images do not share."""
    made, prepare = [], Velocity._prepare
    monkeypatch.setattr(Velocity, "_prepare", lambda *a: made.append(1) or prepare(*a))
    together = latents_of(random_pipeline(), ["a", "b"], num_videos_per_prompt=2)
    assert len(made) == 2 * (2 + 1)  # of each expert, two prompts and the negative one
    assert torch.equal(together[3:], latents_of(random_pipeline(), "b", seed=10))
    made.clear()
    torch.manual_seed(0)
    images = [torch.rand(3, 32, 32) for _ in range(2)]
    arguments = {**SMALL, "seed": 7, "output_type": "latent"}
    del arguments["guidance_scale_2"]
    pipe = random_i2v_pipeline(1)
    together = pipe(images, "a", **arguments).frames
    assert len(made) == 4
    assert torch.equal(together[1:], pipe(images[1], "a", **arguments | {"seed": 8}).frames)
    made.clear()
    pipe(images[0], "a", **arguments, num_videos_per_prompt=2)
    assert len(made) == 2


def test_keeping_alone_changes_nothing(run, monkeypatch):
    kept = run()
    monkeypatch.setattr("wan22.pipelines.base.Velocity", forgets)
    assert torch.equal(kept, run())


def test_a_callback_may_change_weights():
    """As set_adapters does: the next step is computed with the new ones."""

    def change(pipe, step, *_):
        if step == 0:
            for model in pipe.transformers:
                model.blocks[0].attn2.to_v.weight.data.mul_(1.5)
        return {}

    results = []
    for keep in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wan22.pipelines.base.Velocity", Velocity if keep else forgets)
            parts = {n: copy.deepcopy(random_components()[n]) for n in ("transformer", "transformer_2")}
            results.append(latents_of(random_pipeline(**parts), callback_on_step_end=change))
    assert torch.equal(*results)
    assert not torch.equal(results[0], latents_of(random_pipeline()))


def test_merging_zero_rows():
    rows = torch.randn(1, 512, 8)
    rows[:, 3:] = 0
    merged, bias = merge_zero_rows(rows)
    assert torch.equal(merged, rows[:, :4])
    assert bias[0, :3].tolist() == [0, 0, 0]
    assert bias[0, 3].exp().item() == pytest.approx(509)


@pytest.mark.parametrize("zeros", [0, 1])
def test_nothing_to_merge(zeros):
    rows = torch.randn(1, 6, 8)
    rows[:, 6 - zeros :] = 0
    merged, bias = merge_zero_rows(rows)
    assert merged is rows
    assert bias is None


def test_a_zero_row_inside_a_prompt_is_not_merged():
    rows = torch.randn(1, 10, 8)
    rows[:, 2] = 0
    rows[:, 6:] = 0
    merged, _ = merge_zero_rows(rows)
    assert torch.equal(merged, rows[:, :7])


def test_all_rows_zero():
    merged, bias = merge_zero_rows(torch.zeros(1, 512, 8))
    assert merged.shape == (1, 1, 8)
    assert bias.exp().item() == pytest.approx(512)
