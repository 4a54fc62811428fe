"""Calls with the settings of distilled models, against loops written out here."""

import copy
import json
import logging

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, make_lora
from wan22 import FewSteps, FlowMatchEulerScheduler, Phase
from wan22.few_steps import FEW_STEPS
from wan22.video.recipe import Recipe

SIZE = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
SLOTS = ("transformer", "transformer_2")


@pytest.fixture
def pipe():
    return copy.deepcopy(random_pipeline())


def load(pipe, *names):
    """Load a random LoRA for each name, in memory."""
    for i, name in enumerate(names):
        table = make_lora(random_pipeline().transformer, i, share=0.5)
        pipe.load_lora_weights(DIALECTS["diffusion_model, alpha"](table), adapter_name=name)


def expected(pipe, table, seed, boundary=875.0):
    """Sample as the papers write it: fresh noise from the generator that drew the first."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, *pipe.latent_shape(SIZE["num_frames"], SIZE["height"], SIZE["width"]))
    x = table.noise_scale * torch.randn(shape[1:], generator=generator)[None].double()
    text, _ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)
    levels = [*(table.sigmas or [t / 1000 for t in table.timesteps]), 0.0]
    for i, time in enumerate(table.timesteps):
        model = pipe.transformer if time >= boundary else pipe.transformer_2
        with torch.no_grad():
            v = model(x.float(), torch.tensor([time]), text, return_dict=False)[0].double()
        if table.stochastic:
            noise = torch.randn(shape[1:], generator=generator)[None].double()
            x = (1 - levels[i + 1]) * (x - levels[i] * v) + levels[i + 1] * noise
        else:
            x = x - (levels[i] - levels[i + 1]) * v
    return x.float()


@pytest.mark.parametrize("name", sorted(FEW_STEPS.keys() - {"lightning-3-phase"}))
def test_named_settings(name, pipe):
    video = pipe("a red circle", seed=7, distilled=name, **SIZE)
    torch.testing.assert_close(video.frames, expected(pipe, FEW_STEPS[name], 7), atol=2e-5, rtol=1e-5)
    assert video.recipe.distilled == name
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_fresh_noise_is_each_videos_own(pipe):
    together = pipe(["a", "b"], seed=7, distilled="rcm-4", **SIZE).frames
    assert torch.equal(together[1:], pipe("b", seed=8, distilled="rcm-4", **SIZE).frames)


def test_euler_with_fresh_noise_is_that_of_diffusers():
    results = []
    for cls in (FlowMatchEulerScheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = cls(stochastic_sampling=True)
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
        torch.manual_seed(0)
        x = torch.ones(1, 4, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_a_stochastic_step_draws_from_the_generator_it_is_given():
    scheduler, x = FlowMatchEulerScheduler(stochastic_sampling=True), torch.ones(1, 4, 4)

    def step(seed):
        scheduler.set_timesteps(sigmas=[0.9, 0.5])
        return scheduler.step(x, None, x, generator=torch.Generator().manual_seed(seed)).prev_sample

    assert torch.equal(step(3), step(3)) and not torch.equal(step(3), step(4))


# ---- phases ----


def test_a_phase_chooses_the_expert(pipe):
    table = FewSteps((1000, 900, 800), phases=(Phase(950, "transformer_2"), Phase(0, "transformer")))
    seen = []
    for slot in SLOTS:
        hook = lambda *_, slot=slot: seen.append(slot)  # noqa: E731
        getattr(pipe, slot).register_forward_pre_hook(hook)
    pipe("a", seed=7, distilled=table, **SIZE)
    assert seen == ["transformer_2", "transformer", "transformer"]


def test_a_phase_changes_the_strength_of_the_distilled_lora_alone(pipe):
    load(pipe, "style", "lightning")
    table = FewSteps((1000, 900), phases=(Phase(950, lora=0.0), Phase(0)))
    video = pipe("a", seed=7, distilled=table, **SIZE)

    def strengths(pipe, step, timestep, tensors):
        pipe.set_adapters(["style", "lightning"], [1.0, 1.0])
        return {}

    pipe.set_adapters(["style", "lightning"], [1.0, 0.0])
    plain = FewSteps((1000, 900))
    by_hand = pipe("a", seed=7, distilled=plain, callback_on_step_end=strengths, **SIZE)
    assert torch.equal(video.frames, by_hand.frames)
    assert json.loads(json.dumps(video.recipe.call["distilled"]))["phases"][0]["lora"] == 0
    again = Recipe.from_json(video.recipe.to_json())
    assert torch.equal(pipe.reproduce(again, anyway=True, output_type="latent").frames, video.frames)


def test_factors_by_name_for_one_call(pipe):
    load(pipe, "a", "b")
    both = latents_of(pipe)
    found = latents_of(pipe, attention_kwargs={"scale": {"a": 0.5}})
    assert torch.equal(latents_of(pipe), both)
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    assert torch.equal(latents_of(pipe), found)
    with pytest.raises(ValueError, match=r"scale.*='c' must be one of 'a', 'b'"):
        latents_of(pipe, attention_kwargs={"scale": {"c": 0.5}})
    with pytest.raises(ValueError, match=r"scale'\]='x' must be"):
        latents_of(pipe, attention_kwargs={"scale": "x"})


def test_strengths_that_cannot_change_are_refused(pipe):
    table = FewSteps((1000, 900), phases=(Phase(950, lora=0.0), Phase(0)))
    with pytest.raises(ValueError, match="none is loaded; load it with load_lora_weights"):
        pipe("a", distilled=table, **SIZE)
    load(pipe, "x")
    named = FewSteps((1000, 900), phases=(Phase(950, lora={"y": 0.0}), Phase(0)))
    with pytest.raises(ValueError, match=r"names the adapter 'y'; pipe\.transformer has x"):
        pipe("a", distilled=named, **SIZE)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="'x', which is fused into the weights; call unfuse_lora"):
        pipe("a", distilled=table, **SIZE)


def test_weights_that_look_distilled_are_hinted_at(pipe, caplog):
    load(pipe, "my-lightning")
    with caplog.at_level(logging.WARNING, logger="wan22"):
        pipe("a", num_inference_steps=4, **SIZE)
        pipe("a", distilled="lightning-4", **SIZE)
        assert not caplog.records
        pipe("a", num_inference_steps=20, **SIZE)
    assert "'my-lightning' looks distilled to a few steps" in caplog.text
    assert "takes 20; distilled='lightning-4' has its settings" in caplog.text


def test_lightning_in_three_phases(pipe):
    """The first step is the undistilled expert's, with guidance; then LoRAs, without."""
    load(pipe, "lightning")
    calls = []
    for slot in SLOTS:
        model = getattr(pipe, slot)
        hook = lambda m, args, kwargs, slot=slot: calls.append(  # noqa: E731
            (slot, (kwargs["attention_kwargs"] or {}).get("scale"))
        )
        model.register_forward_pre_hook(hook, with_kwargs=True)
    video = pipe("a", seed=7, distilled="lightning-3-phase", **SIZE)
    off, on = {"lightning": 0.0}, None
    expected = [("transformer", off)] * 2 + [("transformer", on)] * 3 + [("transformer_2", on)] * 4
    assert calls == expected
    assert video.recipe.guidance_scale == [3.5] + [1.0] * 7
    again = Recipe.from_json(video.recipe.to_json())
    assert torch.equal(pipe.reproduce(again, anyway=True, output_type="latent").frames, video.frames)
    calls.clear()
    pipe("a", seed=7, distilled="lightning-3-phase", guidance_scale=1.0, **SIZE)
    assert calls == expected[1:]
