"""What a call takes and gives: the recipe, batches, seeds, embeddings, schedules, output types."""

import copy
import inspect
import json
import logging

import diffusers
import numpy as np
import pytest
import torch

from tests.builders import SMALL, TEXT_DIM, latents_of, random_pipeline, recording
from wan22 import FlowMatchEulerScheduler, WanT2VPipeline
from wan22.pipelines.call.noise import draw
from wan22.presets import NEGATIVE_PROMPT

# ---- diffusers' names ----


@pytest.mark.parametrize("method", ["__init__", "__call__", "encode_prompt"])
def test_arguments_are_those_of_diffusers_in_their_order(method):
    ours = list(inspect.signature(getattr(WanT2VPipeline, method)).parameters)
    theirs = list(inspect.signature(getattr(diffusers.WanPipeline, method)).parameters)
    assert ours[: len(theirs)] == theirs


# ---- the recipe ----


def test_nothing_but_a_prompt(pipe, tiny_preset, caplog):
    with caplog.at_level(logging.INFO, logger="wan22"), recording(pipe) as calls:
        video = pipe("a red circle")
    recipe = video.recipe
    assert video.frames.shape == (1, 5, 32, 48, 3)
    assert video.fps == recipe.fps == 12
    settings = {
        "checkpoint": "random-t2v",
        "pipeline": "WanT2VPipeline",
        "call": {
            "prompt": ["a red circle"],
            "negative_prompt": [NEGATIVE_PROMPT],
            "seed": list(recipe.seeds),
            "height": 32,
            "width": 48,
            "num_frames": 5,
            "num_inference_steps": 3,
            "num_videos_per_prompt": 1,
            "flow_shift": 5.0,
            "guidance_scale": 3.0,
            "guidance_scale_2": 2.0,
            "max_sequence_length": 512,
            "noise_device": "cpu",
            **dict.fromkeys(("attention_kwargs", "distilled", "sigmas", "timesteps")),
            **dict.fromkeys(("attention", "cache", "fast", "guidance", "guidance_interval")),
            "resolution_schedule": None,
        },
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "fps": 12,
        "scheduler": "FlowMatchUniPCScheduler",
        "num_inference_steps": 3,
        "boundary_ratio": 0.875,
        "pictures": {},
        "origin": None,
        "loras": (),
        "dtypes": dict.fromkeys(("text_encoder", "transformer", "transformer_2", "vae"), "float32"),
        "changes": {},
        "memory": None,
        "passes": (),
        "sizes": (),
        "steps_done": None,
        "not_reproducible_because": None,
    }
    around = ("scheduler_config", "device", "versions")
    found = recipe.to_dict()
    assert {name: value for name, value in found.items() if name not in around} == settings
    assert found["scheduler_config"]["solver_order"] == 2 and found["versions"]["torch"] == torch.__version__
    json.dumps(found)
    assert [name for name, _ in calls].count("text_encoder") == 2
    lines = [r.message for r in caplog.records if "random-t2v" in r.message and r.levelno == logging.INFO]
    assert lines == [str(recipe)]


def test_the_recipe_in_one_line(pipe, tiny_preset):
    recipe = pipe(["a", "b"], seed=4, output_type="latent").recipe
    assert str(recipe) == (
        "random-t2v: 2 x 48x32, 5 frames at 12 fps, 3 steps of FlowMatchUniPCScheduler, shift 5, "
        "guidance 3/2 (high/low noise, boundary 0.875), seeds 4, 5"
    )


def test_the_recipe_repeats_the_video(pipe, tiny_preset):
    """A drawn seed is told, and with it the same video comes again."""
    video = pipe("a", output_type="latent")
    (seed,) = video.recipe.seeds
    assert torch.equal(pipe("a", seed=seed, output_type="latent").frames, video.frames)
    assert pipe("a", output_type="latent").recipe.seeds != (seed,)


def test_every_given_value_is_kept(pipe, tiny_preset):
    recipe = pipe(
        "a",
        "fog",
        height=48,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=2.5,
        guidance_scale_2=1.5,
        flow_shift=3.0,
        seed=11,
        output_type="latent",
    ).recipe
    assert (recipe.height, recipe.width, recipe.num_frames, recipe.num_inference_steps) == (48, 32, 9, 2)
    assert (recipe.guidance_scale, recipe.guidance_scale_2, recipe.flow_shift) == (2.5, 1.5, 3.0)
    assert (recipe.seeds, recipe.negative_prompt, recipe.prompts) == ((11,), ["fog"], ("a",))


def test_the_recipe_tells_what_guidance_did_not_use(pipe):
    recipe = pipe(
        "a", seed=0, output_type="latent", **{**SMALL, "guidance_scale": 1.0, "guidance_scale_2": 1.0}
    ).recipe
    assert recipe.negative_prompt is None


def test_the_shift_of_the_loaded_scheduler_counts(tiny_preset):
    """What from_pretrained leaves in the scheduler is used, so that a folder's own choice holds."""
    from wan22 import FlowMatchUniPCScheduler

    pipe = random_pipeline(scheduler=FlowMatchUniPCScheduler(shift=2.0))
    video = pipe("a", seed=0, output_type="latent")
    assert video.recipe.flow_shift == 2.0
    assert torch.equal(video.frames, pipe("a", seed=0, output_type="latent", flow_shift=2.0).frames)


def test_an_unknown_checkpoint_takes_its_relatives_recipe(pipe, ti2v_pipe, single_pipe):
    assert (pipe.preset.name, pipe.checkpoint_name) == ("Wan2.2-T2V-A14B", "unnamed checkpoint")
    assert ti2v_pipe.preset.name == "Wan2.2-TI2V-5B"
    assert single_pipe.preset.boundary_ratio is None
    assert pipe.released is None


# ---- negative prompts ----


@pytest.mark.parametrize("empty", [None, "", [""]])
def test_an_empty_negative_prompt_means_the_default(pipe, empty):
    assert torch.equal(
        latents_of(pipe, negative_prompt=empty), latents_of(pipe, negative_prompt=NEGATIVE_PROMPT)
    )


def test_the_negative_prompt_counts(pipe):
    assert not torch.equal(latents_of(pipe, negative_prompt="fog"), latents_of(pipe))


def test_one_negative_prompt_per_prompt(pipe):
    both = latents_of(pipe, ["a", "b"], negative_prompt=["fog", ""], seed=[1, 2])
    assert torch.equal(both[:1], latents_of(pipe, "a", negative_prompt="fog", seed=1))
    assert torch.equal(both[1:], latents_of(pipe, "b", seed=2))


# ---- batches: a video does not depend on its neighbours, to the last bit ----


def test_a_list_of_prompts(pipe):
    prompts = ["a red circle", "a much longer prompt about a blue square", "x"]
    batch = latents_of(pipe, prompts, seed=5)
    for i, prompt in enumerate(prompts):
        assert torch.equal(batch[i : i + 1], latents_of(pipe, prompt, seed=5 + i))


def test_decoded_frames_do_not_depend_on_the_batch(pipe):
    batch = pipe(["a", "b"], seed=5, **SMALL).frames
    assert np.array_equal(batch[1:], pipe("b", seed=6, **SMALL).frames)


def test_several_videos_per_prompt(pipe):
    batch = latents_of(pipe, ["a", "b"], num_videos_per_prompt=2, seed=5)
    for i, prompt in enumerate(["a", "a", "b", "b"]):
        assert torch.equal(batch[i : i + 1], latents_of(pipe, prompt, seed=5 + i))


def test_a_list_of_seeds(pipe):
    batch = latents_of(pipe, "a", num_videos_per_prompt=2, seed=[9, 3])
    assert torch.equal(batch[:1], latents_of(pipe, "a", seed=9))
    assert torch.equal(batch[1:], latents_of(pipe, "a", seed=3))


def test_a_list_of_generators(pipe):
    generators = [torch.Generator().manual_seed(s) for s in (9, 3)]
    batch = latents_of(pipe, ["a", "b"], generator=generators)
    assert torch.equal(batch[:1], latents_of(pipe, "a", seed=9))
    assert torch.equal(batch[1:], latents_of(pipe, "b", seed=3))


def test_one_generator_draws_one_video_after_the_other(pipe):
    batch = latents_of(pipe, ["a", "b"], generator=torch.Generator().manual_seed(9))
    assert torch.equal(batch[:1], latents_of(pipe, "a", seed=9))
    generator = torch.Generator().manual_seed(9)
    latents_of(pipe, "a", generator=generator)
    assert torch.equal(batch[1:], latents_of(pipe, "b", generator=generator)), "the generator goes on"
    recipe = pipe(["a", "b"], generator=generator.manual_seed(9), output_type="latent", **SMALL).recipe
    assert recipe.seeds == (9, None)


def test_the_same_call_twice(pipe):
    assert torch.equal(latents_of(pipe), latents_of(pipe))
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline()))


def test_another_seed_is_another_video(pipe):
    assert not torch.equal(latents_of(pipe, seed=1), latents_of(pipe, seed=2))


def test_one_generator_draws_all_videos_at_once():
    """As in diffusers: of noise in other numbers than multiples of 16, and on a GPU, it is other noise."""
    g = torch.Generator().manual_seed(9)
    drawn = draw([g, g], (3, 7), "cpu")
    assert torch.equal(drawn, torch.randn((2, 3, 7), generator=g.manual_seed(9)))


def test_with_a_seed_the_global_generator_is_left_alone(pipe):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    latents_of(pipe)
    pipe("a", seed=1, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_the_global_generator_decides(pipe):
    """One number of it for all videos, which the recipe tells; the run itself leaves it alone."""
    torch.manual_seed(0)
    first = pipe(["a", "b"], output_type="latent", **SMALL)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    again = pipe(["a", "b"], output_type="latent", **SMALL)
    assert torch.equal(again.frames, first.frames) and again.recipe == first.recipe
    seed, following = first.recipe.seeds
    assert following == seed + 1 and 0 <= seed < 2**32
    assert torch.equal(pipe("b", seed=following, output_type="latent", **SMALL).frames, first.frames[1:])
    torch.manual_seed(0)
    torch.randint(2**32, ())
    assert torch.equal(torch.random.get_rng_state(), after)


# ---- latents and noise ----


def test_given_latents(pipe):
    noise = torch.randn(pipe.latent_shape(5, 32, 32), generator=torch.Generator().manual_seed(7))[None]
    kept = noise.clone()
    video = pipe("a red circle", latents=noise, output_type="latent", **SMALL)
    assert torch.equal(video.frames, latents_of(pipe, seed=7))
    assert torch.equal(noise, kept)
    assert video.recipe.seeds == (None,)


def test_latent_shape(pipe, ti2v_pipe):
    assert pipe.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert ti2v_pipe.latent_shape(121, 704, 1280) == (48, 31, 44, 80)


def test_noise_device(pipe):
    assert torch.equal(latents_of(pipe, noise_device="cpu"), latents_of(pipe))
    with pytest.raises(ValueError, match="noise_device='nowhere' is not there to draw on; 'cpu' always is"):
        latents_of(pipe, noise_device="nowhere")


def test_the_latents_stay_float32(pipe):
    half = {
        name: copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16)
        for name in ("transformer", "transformer_2")
    }
    pipe = random_pipeline(**half)
    seen, step = set(), pipe.scheduler.step

    def record(velocity, timestep, sample, **kwargs):
        seen.update((velocity.dtype, sample.dtype))
        return step(velocity, timestep, sample, **kwargs)

    pipe.scheduler.step = record
    assert latents_of(pipe).dtype == torch.float32
    assert seen == {torch.float32}


# ---- embeddings ----


def test_embeddings_kept_by_the_caller(pipe):
    embeds, negative = pipe.encode_prompt("a red circle", "fog")
    assert embeds.shape == negative.shape == (1, 512, TEXT_DIM)
    reference = latents_of(pipe, negative_prompt="fog")
    without = random_pipeline(text_encoder=None, tokenizer=None)
    for _ in range(2):
        given = latents_of(without, prompt_embeds=embeds, negative_prompt_embeds=negative)
        assert torch.equal(given, reference)


def test_short_embeddings_are_padded_with_zeros(pipe):
    embeds, negative = pipe.encode_prompt("a red circle", "fog")
    rows = [int(e.any(-1).sum()) for e in (embeds, negative)]
    assert max(rows) < 20
    short = latents_of(
        pipe, prompt_embeds=embeds[:, : rows[0]], negative_prompt_embeds=negative[:, : rows[1]]
    )
    assert torch.equal(short, latents_of(pipe, negative_prompt="fog"))


def test_embeddings_with_a_negative_prompt_as_text(pipe):
    embeds, _ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)
    assert torch.equal(latents_of(pipe, prompt_embeds=embeds), latents_of(pipe))


def test_a_prompt_with_negative_embeddings(pipe):
    _, negative = pipe.encode_prompt("", "fog")
    assert torch.equal(
        latents_of(pipe, negative_prompt_embeds=negative), latents_of(pipe, negative_prompt="fog")
    )


def test_embeddings_of_several_prompts(pipe):
    embeds, negative = pipe.encode_prompt(["a", "b"], "fog")
    arguments = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "num_videos_per_prompt": 2,
        "seed": 5,
    }
    batch = latents_of(pipe, **arguments)
    assert torch.equal(
        batch, latents_of(pipe, ["a", "b"], negative_prompt="fog", num_videos_per_prompt=2, seed=5)
    )


def test_encode_prompt(pipe):
    embeds, negative = pipe.encode_prompt(["a", "b"], num_videos_per_prompt=2, dtype=torch.bfloat16)
    assert embeds.shape == negative.shape == (4, 512, TEXT_DIM)
    assert embeds.dtype == negative.dtype == torch.bfloat16
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.equal(embeds[1], embeds[2])
    assert pipe.encode_prompt("a", do_classifier_free_guidance=False)[1] is None
    assert not embeds.requires_grad


def test_each_text_is_encoded_once(pipe):
    with recording(pipe) as calls:
        latents_of(pipe, ["a", "a", "b"], negative_prompt="a", num_videos_per_prompt=2)
    assert [name for name, _ in calls].count("text_encoder") == 2


def test_max_sequence_length(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        cut = latents_of(pipe, "abcdefgh", negative_prompt="f", max_sequence_length=4)
    assert "the prompt has 9 tokens, 4 are used; ignored: 'defgh'" in caplog.text
    assert torch.equal(cut, latents_of(pipe, "abc", negative_prompt="f"))


# ---- schedules ----


def test_flow_shift(pipe):
    video = pipe("a", seed=0, output_type="latent", **{**SMALL, "flow_shift": 12.0})
    assert video.recipe.flow_shift == 12.0
    assert pipe.scheduler.timesteps.tolist() == [999, 959, 856]
    assert pipe.scheduler.config.shift == 5.0, "the pipeline's own shift stays"
    assert not torch.equal(latents_of(pipe, flow_shift=12.0), latents_of(pipe))
    assert torch.equal(latents_of(pipe, flow_shift=None), latents_of(pipe, flow_shift=5.0))


def test_custom_timesteps(pipe):
    video = pipe("a", seed=0, timesteps=[1000, 937.5, 833.3, 625], output_type="latent", height=32, width=32,
                 num_frames=5, guidance_scale=1.0)  # fmt: skip
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3, 625])
    assert (video.recipe.num_inference_steps, video.recipe.flow_shift) == (4, None)
    assert "4 steps of FlowMatchUniPCScheduler, custom schedule" in str(video.recipe)


def test_custom_sigmas():
    """The same levels, given as sigmas or as timesteps, are the same schedule."""
    pipe = random_pipeline(scheduler=FlowMatchEulerScheduler())
    by_sigmas = latents_of(pipe, sigmas=[1.0, 0.75, 0.25])
    assert torch.equal(by_sigmas, latents_of(pipe, timesteps=[1000, 750, 250]))
    assert pipe.scheduler.sigmas.tolist() == [1.0, 0.75, 0.25, 0.0]


def test_more_steps_than_the_last_call(pipe):
    """A call leaves nothing behind in the scheduler."""
    reference = latents_of(random_pipeline(), num_inference_steps=4)
    latents_of(pipe, num_inference_steps=2)
    assert torch.equal(latents_of(pipe, num_inference_steps=4), reference)
    assert pipe.num_timesteps == 4
    assert pipe.current_timestep is None


def test_repeated_integer_timesteps(pipe):
    latents = latents_of(
        pipe, num_inference_steps=100, flow_shift=12.0, guidance_scale=1.0, guidance_scale_2=1.0
    )
    assert len(set(pipe.scheduler.timesteps.tolist())) < 100
    assert torch.isfinite(latents).all()


# ---- TI2V-5B ----


def test_ti2v_in_text_mode(ti2v_pipe):
    video = ti2v_pipe("a", height=64, width=32, num_frames=5, num_inference_steps=2, seed=0)
    assert video.frames.shape == (1, 5, 64, 32, 3)
    assert video.fps == 24
    assert video.recipe.guidance_scale_2 is None
    assert str(video.recipe).endswith("shift 5, guidance 5, seeds 0")
