"""Errors before any work: each names the value, the rule and the nearest valid value."""

import inspect
import logging
import re

import numpy as np
import pytest
import torch

from tests.builders import SMALL, random_pipeline, recording
from wan22 import FlowMatchUniPCScheduler, read_recipe
from wan22.accel import plan
from wan22.video.recipe import Recipe

ROWS = torch.zeros(1, 4, 32)
NAN = float("nan")
INF = float("inf")
LATENTS = (1, 16, 2, 4, 4)

CASES = [
    # sizes
    ({"height": 100}, ["height=100", "multiple of 16", "96 and 112"]),
    ({"width": 40}, ["width=40", "multiple of 16", "32 and 48"]),
    ({"width": 7}, ["width=7", "multiple of 16", "16 and 32"]),
    ({"height": 0}, ["height=0", "multiple of 16", "16 and 32"]),
    ({"height": -16}, ["height=-16", "positive", "16 and 32"]),
    ({"height": 32.0}, ["height=32.0", "an int", "32"]),
    ({"height": 40.5}, ["height=40.5", "multiple of 16", "32 and 48"]),
    ({"height": NAN}, ["height=nan", "multiple of 16", "such as 64"]),
    ({"height": INF}, ["height=inf", "multiple of 16", "such as 64"]),
    ({"width": "32"}, ["width='32'", "multiple of 16", "such as 64"]),
    ({"width": True}, ["width=True", "multiple of 16", "such as 64"]),
    # frames
    ({"num_frames": 6}, ["num_frames=6", "1 + a multiple of 4", "5 and 9"]),
    ({"num_frames": 80}, ["num_frames=80", "1 + a multiple of 4", "77 and 81"]),
    ({"num_frames": 0}, ["num_frames=0", "1 + a multiple of 4", "1 and 5"]),
    ({"num_frames": -3}, ["num_frames=-3", "1 + a multiple of 4", "1 and 5"]),
    ({"num_frames": 5.5}, ["num_frames=5.5", "1 + a multiple of 4", "5 and 9"]),
    ({"num_frames": True}, ["num_frames=True", "1 + a multiple of 4", "such as 17"]),
    ({"num_frames": "5"}, ["num_frames='5'", "1 + a multiple of 4", "such as 17"]),
    # prompts
    ({"prompt": None}, ["prompt or prompt_embeds"]),
    ({"prompt": 3}, ["prompt must be a string or a non-empty list of strings", "int 3"]),
    ({"prompt": []}, ["prompt must be", "non-empty list of strings", "list []"]),
    ({"prompt": ["a", 3]}, ["prompt must be", "list ['a', 3]"]),
    ({"prompt": b"a"}, ["prompt must be", "bytes b'a'"]),
    ({"prompt_embeds": ROWS}, ["prompt or prompt_embeds, and only one"]),
    (
        {"negative_prompt": ["a", "b"]},
        ["negative_prompt has 2 entries for 1 prompts", "give 1, or one string"],
    ),
    ({"negative_prompt": 3}, ["negative_prompt must be a string", "int 3"]),
    ({"negative_prompt": []}, ["negative_prompt must be a string or a non-empty list", "list []"]),
    ({"negative_prompt": 0}, ["negative_prompt must be a string", "int 0"]),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": ROWS},
        ["negative_prompt or negative_prompt_embeds, not both"],
    ),
    # embeddings
    (
        {"prompt": None, "prompt_embeds": "a"},
        ["prompt_embeds must be a floating-point tensor 'b l 32'", "str 'a'"],
    ),
    ({"prompt": None, "prompt_embeds": ROWS[0]}, ["prompt_embeds must be", "'b l 32'", "(4, 32)"]),
    ({"prompt": None, "prompt_embeds": ROWS.long()}, ["floating-point", "int64 tensor of shape (1, 4, 32)"]),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 31)}, ["(1, 4, 31)", "'b l 32'", "1 to 512"]),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 513, 32)}, ["(1, 513, 32)", "1 to 512"]),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 0, 32)}, ["(1, 0, 32)", "1 to 512"]),
    ({"prompt": None, "prompt_embeds": torch.zeros(0, 4, 32)}, ["(0, 4, 32)", "'b l 32'"]),
    ({"prompt": None, "prompt_embeds": torch.full((1, 4, 32), NAN)}, ["prompt_embeds", "finite"]),
    ({"negative_prompt_embeds": torch.full((1, 4, 32), INF)}, ["negative_prompt_embeds", "finite"]),
    ({"negative_prompt_embeds": torch.zeros(1, 4, 31)}, ["negative_prompt_embeds", "(1, 4, 31)", "'b l 32'"]),
    ({"negative_prompt_embeds": torch.zeros(2, 4, 32)}, ["negative_prompt_embeds is for 2", "for 1"]),
    # steps
    ({"num_inference_steps": 0}, ["num_inference_steps=0", "at least 1", "nearest is 1"]),
    ({"num_inference_steps": -1}, ["num_inference_steps=-1", "at least 1", "nearest is 1"]),
    ({"num_inference_steps": 1.5}, ["num_inference_steps=1.5", "an int", "nearest is 2"]),
    ({"num_inference_steps": 39.9}, ["num_inference_steps=39.9", "an int", "nearest is 40"]),
    ({"num_inference_steps": True}, ["num_inference_steps=True", "an int"]),
    ({"num_inference_steps": "4"}, ["num_inference_steps='4'", "an int"]),
    ({"num_inference_steps": NAN}, ["num_inference_steps=nan", "an int"]),
    # schedule
    ({"flow_shift": 0}, ["shift", "0", "above 0"]),
    ({"flow_shift": NAN}, ["shift", "nan"]),
    ({"timesteps": [900, 400]}, ["num_inference_steps=3 contradicts 2 timesteps"]),
    ({"num_inference_steps": None, "timesteps": [900, 400]}, ["shift=5.0", "leave the shift out"]),
    (
        {"num_inference_steps": None, "flow_shift": None, "sigmas": [0.5], "timesteps": [600]},
        ["sigmas[0] = 0.5", "timesteps[0] = 600", "0.6 does not"],
    ),
    (
        {"num_inference_steps": None, "flow_shift": None, "timesteps": [1001]},
        ["timesteps", "1001", "nearest are [1000]"],
    ),
    # guidance
    ({"guidance_scale": 0.5}, ["guidance_scale=0.5", "1 or more", "1 turns guidance off"]),
    ({"guidance_scale": NAN}, ["guidance_scale=nan", "1 or more"]),
    ({"guidance_scale": INF}, ["guidance_scale=inf", "1 or more"]),
    ({"guidance_scale": "5"}, ["guidance_scale='5'", "a number"]),
    ({"guidance_scale": True}, ["guidance_scale=True", "a number"]),
    ({"guidance_scale_2": 0.0}, ["guidance_scale_2=0.0", "1 or more"]),
    # how many
    ({"num_videos_per_prompt": 0}, ["num_videos_per_prompt=0", "at least 1", "nearest is 1"]),
    ({"num_videos_per_prompt": None}, ["num_videos_per_prompt=None", "at least 1"]),
    ({"max_sequence_length": 0}, ["max_sequence_length=0", "1 to 512", "nearest is 1"]),
    ({"max_sequence_length": 600}, ["max_sequence_length=600", "1 to 512", "nearest is 512"]),
    # seeds
    ({"seed": -1}, ["seed=-1", "0 to 2**63 - 1", "nearest is 0"]),
    ({"seed": 2**63}, [f"seed={2**63}", "0 to 2**63 - 1", f"nearest is {2**63 - 1}"]),
    ({"seed": 1.5}, ["seed=1.5", "an int"]),
    ({"seed": True}, ["seed=True", "an int"]),
    ({"seed": "7"}, ["seed='7'", "an int"]),
    ({"seed": [1, None]}, ["seed=None", "an int"]),
    ({"seed": [1, 2]}, ["2 seeds for 1 videos", "give 1, or one"]),
    ({"seed": 1, "generator": torch.Generator()}, ["seed and generator"]),
    ({"generator": [torch.Generator()] * 3}, ["3 generators for 1 videos", "give 1, or one"]),
    ({"generator": 7}, ["generator", "torch.Generator", "int 7"]),
    ({"generator": [7]}, ["generator", "torch.Generator", "int 7"]),
    # latents
    ({"latents": torch.zeros(1, 16, 2, 4, 5)}, ["latents must be", f"{LATENTS}", "(1, 16, 2, 4, 5)"]),
    ({"latents": torch.zeros(2, *LATENTS[1:])}, [f"{LATENTS}", "(2, 16, 2, 4, 4)"]),
    ({"latents": torch.zeros(LATENTS, dtype=torch.int64)}, ["floating-point", "int64"]),
    ({"latents": [0.0]}, ["latents must be", "list [0.0]"]),
    ({"latents": torch.full(LATENTS, NAN)}, ["latents", "finite"]),
    # output
    ({"output_type": "mp4"}, ["output_type='mp4'", "'np', 'pil', 'pt', 'latent'"]),
    ({"output_type": None}, ["output_type=None", "'np'"]),
]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    CASES,
    ids=[f"{i}-{'-'.join(arguments)}" for i, (arguments, _) in enumerate(CASES)],
)
def test_message(pipe, arguments, parts):
    with recording(pipe) as calls, pytest.raises(ValueError) as error:
        pipe(**{"prompt": "a", **SMALL, **arguments})
    for part in parts:
        assert part in str(error.value)
    assert not calls, "refused before any work"


def test_the_5b_sizes_are_multiples_of_32(ti2v_pipe):
    with pytest.raises(
        ValueError,
        match=re.escape("height=720 must be an int, a positive multiple of 32; the nearest are 704 and 736"),
    ):
        ti2v_pipe("a", height=720)


def test_several_prompts(pipe):
    with pytest.raises(
        ValueError, match="negative_prompt has 3 entries for 2 prompts; give 2, or one string"
    ):
        pipe(["a", "b"], negative_prompt=["c", "d", "e"], **SMALL)
    with pytest.raises(ValueError, match="2 seeds for 4 videos; give 4, or one"):
        pipe(["a", "b"], num_videos_per_prompt=2, seed=[1, 2], **SMALL)
    with pytest.raises(ValueError, match="negative_prompt_embeds is for 1 prompts; it must be for 2"):
        pipe(["a", "b"], negative_prompt_embeds=ROWS, **SMALL)


@pytest.mark.parametrize("given", [{"prompt": "a"}, {"prompt_embeds": ROWS}])
def test_text_without_a_text_encoder(given):
    """Also where only the default negative prompt needs it."""
    pipe = random_pipeline(text_encoder=None)
    with (
        recording(pipe) as calls,
        pytest.raises(ValueError, match=r"pipe\.text_encoder is None; load it, or give \w*prompt_embeds"),
    ):
        pipe(**given, **SMALL)
    assert not calls


def test_encode_prompt_without_a_prompt(pipe):
    with pytest.raises(
        ValueError, match="prompt must be a string or a non-empty list of strings, not NoneType None"
    ):
        pipe.encode_prompt()


# ---- messages of bounded length, whatever the caller's values ----

LONG = "x" * 50_000
SHORT = 1000  # characters
VALUES = [LONG, [LONG] * 3, {LONG: LONG}, [0.5] * 5000, 10**5000, torch.zeros(1, 1, 30, 30), (LONG,) * 4]
SCHEDULER = FlowMatchUniPCScheduler
DOORS = {
    "folder": lambda pipe: type(pipe).from_pretrained(LONG),
    "repository": lambda pipe: type(pipe).from_pretrained(f"a/{LONG}"),
    "file": lambda pipe: type(pipe).from_single_file(LONG),
    "component": lambda pipe: type(pipe).from_pipe(pipe, **{LONG: 1}),
    "model": lambda pipe: type(pipe.transformer).from_pretrained(LONG),
    "model's file": lambda pipe: type(pipe.vae).from_single_file(LONG),
    "recipe": lambda pipe: read_recipe(LONG),
    "LoRA": lambda pipe: pipe.load_lora_weights(LONG),
    "adapter": lambda pipe: pipe.set_adapters(LONG),
    "kernel": lambda pipe: pipe.set_attention_backend(LONG),
    "quantisation": lambda pipe: pipe.quantize(LONG),
    "budget": lambda pipe: pipe.fit(ram=LONG),
    "scheduler": lambda pipe: SCHEDULER.from_pretrained(LONG),
    "scheduler's setting": lambda pipe: SCHEDULER(**{LONG: 1}),
    "scheduler's class": lambda pipe: SCHEDULER.from_config({"_class_name": LONG, "solver_type": LONG}),
    "levels": lambda pipe: SCHEDULER().set_timesteps(sigmas=[0.5] * 5000),
}


def refuse_shortly(call, caplog):
    with pytest.raises((ValueError, OSError, TypeError)) as error:
        call()
    assert len(str(error.value)) < SHORT
    assert all(len(message) < SHORT for message in caplog.messages)


@pytest.mark.parametrize("door", DOORS)
def test_messages_about_names_and_files_are_short(door, pipe, caplog):
    refuse_shortly(lambda: DOORS[door](pipe), caplog)


# Counts as large as 10**5000 are no mistake that a check could see.
@pytest.mark.parametrize("name", ["guidance_scale", "seed", "sigmas", "timesteps", "output_type", "latents"])
def test_messages_about_arguments_are_short(name, pipe, caplog):
    for value in VALUES:
        arguments = {"prompt": "a", **SMALL, "num_inference_steps": None, name: value}
        refuse_shortly(lambda arguments=arguments: pipe(**arguments), caplog)


def test_a_long_prompt_and_many_seeds_are_short_in_the_log(pipe, caplog):
    with caplog.at_level(logging.INFO, logger="wan22"):
        pipe("a red circle " * 3000, seed=1, **{**SMALL, "num_inference_steps": 1, "output_type": "latent"})
    assert any("tokens" in message for message in caplog.messages)
    assert all(len(message) < SHORT for message in caplog.messages)
    assert len(str(pipe("a", output_type="latent", **SMALL).recipe.of(0))) < SHORT


# ---- numbers of any library ----


@pytest.mark.parametrize("of", [np.int64, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch(pipe, of):
    plain = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
    plain |= {"max_sequence_length": 64, "num_videos_per_prompt": 1}
    numbers = {"guidance_scale": 2.5, "guidance_scale_2": 1.5, "flow_shift": 4.0}
    scalar = np.float32 if of is np.int64 else of
    theirs = {n: of(v) for n, v in plain.items()} | {n: scalar(v) for n, v in numbers.items()}
    expected = pipe("a", output_type="latent", **plain, **numbers)
    video = pipe("a", output_type="latent", **theirs)
    assert torch.equal(video.frames, expected.frames)
    assert video.recipe == expected.recipe and video.recipe.to_json() == expected.recipe.to_json()


def test_lists_of_numpy(pipe):
    settings = {**SMALL, "num_inference_steps": None, "flow_shift": None, "output_type": "latent"}
    expected = pipe(["a", "b"], seed=[3, 4], sigmas=[1.0, 0.5], **settings)
    for seeds in ([np.int64(3), np.uint8(4)], np.array([3, 4]), torch.tensor([3, 4])):
        video = pipe(["a", "b"], seed=seeds, sigmas=np.array([1.0, 0.5], np.float32), **settings)
        assert torch.equal(video.frames, expected.frames)
        assert video.recipe.to_json() == expected.recipe.to_json()


def test_numbers_of_numpy_beside_a_call(tmp_path):
    pipe = random_pipeline(boundary_ratio=np.float32(0.875))
    assert type(pipe.config.boundary_ratio) is float
    pipe.register_to_config(boundary_ratio=np.float32(0.5))  # as scripts for diffusers do
    video = pipe("a", preview=lambda preview: None, preview_every=np.int64(1), **SMALL)
    assert Recipe.from_json(video.recipe.to_json()) == video.recipe
    (plain,) = video.save(tmp_path / "plain.mp4", quality=80)
    (theirs,) = video.save(tmp_path / "theirs.mp4", quality=torch.tensor(80))
    assert plain.read_bytes() == theirs.read_bytes()
    with pytest.raises(ValueError, match="quality=True must be an int"):
        video.save(tmp_path / "true.mp4", quality=True)
    size = {"width": 64, "height": 48, "num_frames": 5}
    numbers = {name: np.int64(value) for name, value in size.items()}
    assert plan(pipe, ram=np.float64(1e10), videos=np.int8(1), **numbers) == plan(pipe, ram="10GB", **size)
    pipe.vae.enable_strips(np.int64(2))
    assert type(pipe.vae.num_strips) is int
    pipe.vae.disable_strips()


def test_an_argument_that_the_call_does_not_have():
    """The nearest is told, in streams and in what reproduce changes, too."""
    pipe = random_pipeline()
    with pytest.raises(TypeError, match=r"^the call: recipe is called distilled now$"):
        pipe("a", recipe="lightning-4")
    with pytest.raises(
        TypeError, match=r"^the call has no argument num_inference_step; the nearest is num_inf"
    ):
        pipe.stream("a", num_inference_step=4)
    with pytest.raises(TypeError, match=r"^the call has no argument zzz; it has attention, attention_kw"):
        pipe("a", zzz=1)
    recipe = pipe("a", output_type="latent", **SMALL).recipe
    with pytest.raises(TypeError, match=r"has no argument seeds; the nearest is seed$"):
        pipe.reproduce(recipe, seeds=4)
    assert next(iter(inspect.signature(pipe.__call__).parameters)) == "prompt"
