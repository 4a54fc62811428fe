"""The denoiser contract, and the noise that solvers draw."""

import copy

import diffusers
import numpy as np
import pytest
import torch

from tests.builders import SMALL, latents_of, random_components, random_i2v_pipeline, random_pipeline
from tests.golden_data import relative_error
from wan22.pipelines.call.denoiser import GuidedDenoiser
from wan22.pipelines.call.noise import NoisePerVideo


def test_a_callback_may_change_weights():
    """As set_adapters does: the next step is computed with the new ones."""

    def change(pipe, step, *_):
        if step == 0:
            for model in pipe.transformers:
                model.blocks[0].attn2.to_v.weight.data.mul_(1.5)
        return {}

    parts = {n: copy.deepcopy(random_components()[n]) for n in ("transformer", "transformer_2")}
    changed = latents_of(random_pipeline(**parts), callback_on_step_end=change)
    assert not torch.equal(changed, latents_of(random_pipeline()))


def test_videos_of_a_batch_are_what_they_are_alone():
    together = latents_of(random_pipeline(), ["a", "b"], num_videos_per_prompt=2)
    assert torch.equal(together[3:], latents_of(random_pipeline(), "b", seed=10))
    torch.manual_seed(0)
    images = [torch.rand(3, 32, 32) for _ in range(2)]
    arguments = {**SMALL, "seed": 7, "output_type": "latent"}
    del arguments["guidance_scale_2"]
    pipe = random_i2v_pipeline(1)
    together = pipe(images, "a", **arguments).frames
    assert torch.equal(together[1:], pipe(images[1], "a", **arguments | {"seed": 8}).frames)


def test_what_wraps_a_denoiser_is_unknown_to_the_loop(monkeypatch):
    """A step cache, in its shortest form: every second step has the velocity of the one before."""

    class EverySecond:
        def __init__(self, inner):
            self.inner, self.known, self.asked = inner, None, []

        def __call__(self, latents, step):
            if step.index % 2 == 0:
                self.asked.append(step.index)
                self.known = self.inner(latents, step)
            return self.known

    pipe = random_pipeline()
    plain, wrapped = latents_of(pipe, num_inference_steps=4), []
    make = pipe.make_denoiser
    monkeypatch.setattr(pipe, "make_denoiser", lambda *a: wrapped.append(EverySecond(make(*a))) or wrapped[0])
    cached = latents_of(pipe, num_inference_steps=4)
    assert isinstance(wrapped[0].inner, GuidedDenoiser)
    assert wrapped[0].asked == [0, 2]
    assert cached.isfinite().all() and not torch.equal(cached, plain)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}


STOCHASTIC = {
    "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=8.0),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0, stochastic_sampling=True),
    "sde": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "sa": lambda: diffusers.SASolverScheduler(**FLOW),
}


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_stochastic_solvers_draw_from_the_videos_own_generators(kind, tmp_path):
    pipe = random_pipeline(scheduler=STOCHASTIC[kind]())
    torch.manual_seed(1)
    first = latents_of(pipe, seed=5)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(latents_of(pipe, seed=5), first), "a seed means one video"
    assert torch.equal(torch.random.get_rng_state(), before)
    pair = latents_of(pipe, ["a red circle", "b"], seed=[5, 6])
    alone = [latents_of(pipe, "a red circle", seed=5), latents_of(pipe, "b", seed=6)]
    assert torch.equal(pair, torch.cat(alone)), "whatever else is in its batch"
    assert not torch.equal(first, latents_of(pipe, seed=6))
    video = pipe(["a red circle", "b"], **SMALL, seed=[5, 6])
    video.save(tmp_path / "clip.webp")
    other = random_pipeline()  # whose scheduler is another one
    again = other.reproduce(tmp_path / "clip-2.webp")
    assert np.array_equal(again.frames, video.frames[1:])
    assert type(other.scheduler).__name__ == "FlowMatchUniPCScheduler"


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_stochastic_solvers_take_the_steps_that_they_take_in_diffusers(kind):
    """One generator for the run is what torch.manual_seed is there."""
    pipe = random_pipeline(scheduler=STOCHASTIC[kind]())
    theirs = diffusers.WanPipeline(**random_components() | {"scheduler": STOCHASTIC[kind]()})
    theirs.set_progress_bar_config(disable=True)
    embeds, negative = pipe.encode_prompt("a", "fog")
    noise = torch.randn(1, *pipe.latent_shape(5, 32, 32), generator=torch.Generator().manual_seed(3))
    arguments = {**SMALL, "prompt_embeds": embeds, "negative_prompt_embeds": negative, "latents": noise}
    del arguments["flow_shift"]
    mine = pipe(**arguments, generator=torch.Generator().manual_seed(11), output_type="latent").frames
    torch.manual_seed(11)
    assert relative_error(mine, theirs(**arguments, output_type="latent").frames) <= 1e-5


def test_steps_with_two_timesteps():
    """Heun's method evaluates the model twice a step, but for the last one."""
    pipe = random_pipeline(scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0))
    seen = []
    arguments = {**SMALL, "flow_shift": None, "seed": 1, "output_type": "latent"}
    video = pipe("a", **arguments, preview=seen.append, preview_every=1)
    assert (video.recipe.num_inference_steps, video.recipe.call["num_inference_steps"]) == (3, 3)
    assert (pipe.num_timesteps, len(seen)) == (5, 5)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_a_shift_that_was_set_by_hand():
    pipe = random_pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    pipe.scheduler.set_shift(2.0)
    video = pipe("a", **SMALL | {"flow_shift": None}, seed=1, output_type="latent")
    assert video.recipe.flow_shift == 2.0
    with pytest.raises(ValueError, match=r"set_shift\(2\) has changed the scheduler"):
        pipe.reproduce(video.recipe)


def test_noise_that_is_not_each_videos_own_is_refused():
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with NoisePerVideo(generators):
        drawn = torch.randn_like(torch.empty(2, 3, dtype=torch.float64))
        own = torch.randn(2, 3, generator=torch.Generator().manual_seed(9))
        with pytest.raises(ValueError, match=r"draws noise of shape \(5,\) for 2 videos"):
            torch.randn(5)
    assert drawn.dtype == torch.float64 and torch.equal(drawn, torch.stack(expected).double())
    assert torch.equal(own, torch.randn(2, 3, generator=torch.Generator().manual_seed(9)))
