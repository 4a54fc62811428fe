"""The denoiser contract, and the noise that solvers draw."""

import copy

import diffusers
import pytest
import torch

from tests.builders import SMALL, latents_of, random_components, random_i2v_pipeline, random_pipeline
from wan22.pipelines.call.denoiser import CFGDenoiser
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
    assert isinstance(wrapped[0].inner, CFGDenoiser)
    assert wrapped[0].asked == [0, 2]
    assert cached.isfinite().all() and not torch.equal(cached, plain)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchLCMScheduler(shift=8.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0, stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_stochastic_solvers_draw_from_the_videos_own_generators(scheduler):
    pipe = random_pipeline(scheduler=scheduler)
    torch.manual_seed(1)
    first = latents_of(pipe, seed=5)
    torch.manual_seed(2)
    assert torch.equal(latents_of(pipe, seed=5), first), "a seed means one video"
    pair = latents_of(pipe, ["a red circle", "b"], seed=[5, 6])
    alone = [latents_of(pipe, "a red circle", seed=5), latents_of(pipe, "b", seed=6)]
    assert torch.equal(pair, torch.cat(alone)), "whatever else is in its batch"
    assert not torch.equal(first, latents_of(random_pipeline(scheduler=scheduler), seed=6))
    video = pipe("a red circle", **SMALL, seed=5, output_type="latent")
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_noise_of_other_shapes_is_pytorchs_own():
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with NoisePerVideo(generators):
        torch.manual_seed(0)
        other = torch.randn(5)
        drawn = torch.randn_like(torch.empty(2, 3, dtype=torch.float64))
        own = torch.randn(2, 3, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(0)
    assert torch.equal(other, torch.randn(5))
    assert drawn.dtype == torch.float64 and torch.equal(drawn, torch.stack(expected).double())
    assert torch.equal(own, torch.randn(2, 3, generator=torch.Generator().manual_seed(9)))
