"""Guidance in a call: which passes run, what is kept between steps, what the recipe says."""

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from tests.accel.features import streamed
from tests.builders import (
    MODELS,
    SMALL,
    latents_of,
    random_components,
    random_i2v_pipeline,
    random_pipeline,
    random_ti2v_pipeline,
    recording,
)
from wan22.guidance import APG, NAG, CFGZeroStar, ClassifierFreeGuidance, Gated, Rescale, SkipLayer
from wan22.pipelines.call.denoiser import GuidedDenoiser
from wan22.pipelines.call.experts import Experts
from wan22.pipelines.call.guidance.named import GUIDERS
from wan22.pipelines.call.guidance.scales import Guidance
from wan22.video.recipe import Recipe

STEPS = 8
SLG = SkipLayer(layers=1, start=0, stop=0.5)
# A formula each, with settings by which it makes a difference in a small call.
FORMULAS = {
    "cfg-zero*": CFGZeroStar(1),
    "apg": APG(threshold=1.0),
    "tcfg": "tcfg",
    "mambo-g": "mambo-g",
    "rescale": Rescale(phi=0.9),
    "slg": SLG,
    "gated": Gated(),
    "nag": NAG(),
    "refreshed": Gated(after=0.1, refresh=1),
    "several": Gated(SkipLayer(Rescale("apg"), layers=0, start=0.2, stop=0.8), after=0.4),
}


def latents(pipe, *arguments, guidance=None, **options):
    own = {"guidance_scale": None, "guidance_scale_2": None} if guidance in ("nag", NAG()) else {}
    return latents_of(
        pipe, *arguments, **{"num_inference_steps": STEPS, "guidance": guidance, **own, **options}
    )


def passes(pipe, **options):
    """How many passes each transformer ran."""
    with recording(pipe) as calls:
        latents(pipe, **options)
    counted = Counter(name for name, _ in calls)
    return counted["transformer"], counted["transformer_2"]


@pytest.fixture
def plain(pipe):
    return latents(pipe)


@pytest.fixture
def steps(pipe):
    """How many steps each transformer has."""
    return passes(pipe, guidance_scale=1.0, guidance_scale_2=1.0)


# ---- what changes nothing ----


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": "cfg"},
        {"guidance": ClassifierFreeGuidance()},
        {"guidance": Gated(after=1)},
        {"guidance": SkipLayer(layers=1, scale=0)},
        {"guidance": Rescale(phi=0)},
        {"guidance_interval": (0, 1)},
    ],
)
def test_it_is_plain_guidance_to_the_bit(pipe, plain, options):
    assert torch.equal(latents(pipe, **options), plain)


def test_one_scale_for_each_step(pipe):
    expected = latents(pipe, guidance_scale=3.0, guidance_scale_2=None)
    for scale in ([3.0] * STEPS, (3,) * STEPS, torch.full((STEPS,), 3.0), lambda sigma: 3.0):
        assert torch.equal(latents(pipe, guidance_scale=scale, guidance_scale_2=None), expected)


def test_scales_of_the_experts_as_a_list(pipe, plain, steps):
    high, low = steps
    assert high and low
    scale = [3.0] * high + [2.0] * low
    assert torch.equal(latents(pipe, guidance_scale=scale, guidance_scale_2=None), plain)


@pytest.mark.parametrize("guidance", GUIDERS)
def test_at_a_scale_of_1_nothing_is_guided(pipe, guidance):
    """But for the formulas that need no second pass."""
    unguided = latents(pipe, guidance_scale=1.0, guidance_scale_2=1.0)
    guidance = SkipLayer(layers=1, start=0) if guidance == "slg" else guidance
    found = latents(pipe, guidance=guidance, guidance_scale=1.0, guidance_scale_2=1.0)
    assert torch.equal(found, unguided) == (guidance not in ("nag", SkipLayer(layers=1, start=0)))


# ---- every formula ----


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_in_a_call(pipe, plain, name, tmp_path):
    guidance = FORMULAS[name]
    both = latents(pipe, ["a red circle", "b"], guidance=guidance)
    assert both.isfinite().all() and not torch.equal(both[:1], plain)
    assert torch.equal(latents(pipe, ["a red circle", "b"], guidance=guidance), both), "nothing is kept"
    alone = [
        latents(pipe, text, seed=7 + i, guidance=guidance) for i, text in enumerate(["a red circle", "b"])
    ]
    assert torch.equal(torch.cat(alone), both), "a video does not depend on its neighbours"
    own = {"guidance_scale": None, "guidance_scale_2": None} if name == "nag" else {}
    video = pipe("a red circle", **{**SMALL, **own, "seed": 7}, guidance=guidance)
    video.save(tmp_path / "a.webp")
    assert (pipe.reproduce(tmp_path / "a.webp").frames == video.frames).all()
    assert pipe.reproduce(video.recipe) == video
    table = video.recipe.call["guidance"]
    assert table["name"] in str(video.recipe) and table["name"] in GUIDERS
    assert Recipe.from_json(video.recipe.to_json()).call["guidance"] == table


@pytest.mark.parametrize("make", [random_i2v_pipeline, random_ti2v_pipeline])
def test_images(make):
    """Of the frames that are given, none is guided away."""
    pipe, image = make(), torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    call = {**SMALL, "image": image, "prompt": "a", "seed": 1, "output_type": "latent"}
    if pipe.config.boundary_ratio is None:
        del call["guidance_scale_2"]
    plain = pipe(**call).frames
    for guidance in ("cfg-zero*", Gated("apg"), SLG):
        assert pipe(**call, guidance=guidance).frames.isfinite().all()
    del call["guidance_scale"]
    call.pop("guidance_scale_2", None)
    assert not torch.equal(pipe(**call, guidance="nag").frames, plain)


def test_calls_of_two_threads(pipe):
    """Each call has what it keeps between steps for itself."""
    several = [FORMULAS["apg"], FORMULAS["several"]] * 2
    expected = [latents(pipe, guidance=guidance) for guidance in several]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda guidance: latents(pipe, guidance=guidance), several))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- passes ----


def test_an_interval(pipe, steps):
    """Outside of it no second pass runs, and the scale is 1."""
    high, low = steps
    inside = [2 <= i < 6 for i in range(STEPS)]
    expected = [high + sum(inside[:high]), low + sum(inside[high:])]
    assert list(passes(pipe, guidance_interval=(0.25, 0.75))) == expected
    scale = [(3.0 if i < high else 2.0) if on else 1.0 for i, on in enumerate(inside)]
    by_list = latents(pipe, guidance_scale=scale, guidance_scale_2=None)
    assert torch.equal(latents(pipe, guidance_interval=(0.25, 0.75)), by_list)


def test_gating_and_the_experts(pipe, steps):
    """Each expert has a full step first, as the differences of the other one are of other statistics."""
    high, low = steps
    for after in (0.0, 0.25, 0.5, 0.75):
        first = round(after * STEPS)
        full = [max(min(first, high), 1), max(first - high, 1)]
        assert list(passes(pipe, guidance=Gated(after=after, refresh=None))) == [
            high + full[0],
            low + full[1],
        ]
    full = [-(-count // 3) for count in steps]
    assert list(passes(pipe, guidance=Gated(after=0, refresh=2))) == [high + full[0], low + full[1]]


def test_passes_of_the_others(pipe, steps):
    high, low = steps
    assert passes(pipe, guidance=CFGZeroStar(high + 1)) == (0, 2 * low - 2)
    assert passes(pipe, guidance="nag", guidance_scale=None, guidance_scale_2=None) == (high, low)
    skipped = [i < 4 for i in range(STEPS)]
    expected = 2 * high + sum(skipped[:high]), 2 * low + sum(skipped[high:])
    assert passes(pipe, guidance=SLG) == expected
    expected = high + sum(skipped[:high]), low + sum(skipped[high:])
    assert passes(pipe, guidance=SLG, guidance_scale=1.0, guidance_scale_2=1.0) == expected


def test_negative_prompts_are_encoded_where_they_are_needed(pipe):
    def texts(**options):
        with recording(pipe) as calls:
            latents(pipe, **options)
        return [name for name, _ in calls].count("text_encoder")

    assert texts(guidance="nag", guidance_scale=None, guidance_scale_2=None) == 2
    assert texts(guidance=SLG, guidance_scale=1.0, guidance_scale_2=1.0) == 1
    assert texts(guidance_scale=[1.0] * STEPS, guidance_scale_2=None) == 1
    assert texts(guidance_scale=[1.0] * (STEPS - 1) + [2.0], guidance_scale_2=None) == 2


def test_a_function_of_the_noise_level(pipe):
    seen = []

    def scale(sigma):
        seen.append(sigma)
        return 4.0 if sigma > 0.9 else 1.5

    video = pipe("a", **{**SMALL, "guidance_scale": scale, "guidance_scale_2": None}, seed=1)
    assert seen == pipe.scheduler.sigmas[:-1].tolist()
    assert video.recipe.guidance_scale == [4.0 if sigma > 0.9 else 1.5 for sigma in seen]
    assert "guidance 1.5 to 4" in str(video.recipe)
    assert pipe.reproduce(video.recipe) == video


# ---- NAG ----


def test_nag_follows_the_negative_prompt(pipe):
    found = {text: latents(pipe, guidance="nag", negative_prompt=text) for text in ("fog", "snow")}
    assert not torch.equal(found["fog"], found["snow"])
    unguided = latents(pipe, guidance_scale=1.0, guidance_scale_2=1.0)
    close = latents(pipe, guidance=NAG(scale=1), guidance_scale=None, guidance_scale_2=None)
    torch.testing.assert_close(close, unguided, rtol=1e-3, atol=1e-3)


def test_nag_with_distilled_models(pipe):
    call = {"seed": 1, "output_type": "latent", "height": 32, "width": 32, "num_frames": 5}
    video = pipe("a", "fog", **call, distilled="lightning-4", guidance="nag")
    assert video.recipe.negative_prompt == ["fog"]
    assert (video.recipe.guidance_scale, video.recipe.guidance_scale_2) == (1.0, 1.0)
    other = pipe("a", "snow", **call, distilled="lightning-4", guidance="nag")
    assert not torch.equal(video.frames, other.frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


# ---- with what else a pipeline may have ----


@pytest.mark.parametrize("what", ["streamed", "compiled", "bfloat16", "token chunks"])
@pytest.mark.parametrize("name", ["slg", "nag"])
def test_its_passes_run_however_the_blocks_do(what, name):
    parts = {n: copy.deepcopy(random_components()[n]) for n in MODELS}
    for slot in ("transformer", "transformer_2"):
        parts[slot].blocks.extend(copy.deepcopy(parts[slot].blocks[0]) for _ in range(3))
    pipe, guidance = random_pipeline(**parts), FORMULAS[name]
    expected = latents(pipe, ["a", "b"], guidance=guidance)
    if what == "streamed":
        streamed(pipe)
        for in_turn in (False, True):
            for model in pipe.transformers:
                model.set_samples_in_turn(in_turn)
            assert torch.equal(latents(pipe, ["a", "b"], guidance=guidance), expected)
        pipe.release()
    elif what == "compiled":
        pipe.compile(backend="eager")
        torch.testing.assert_close(latents(pipe, ["a", "b"], guidance=guidance), expected)
        pipe.uncompile()
    elif what == "token chunks":
        for model in pipe.transformers:
            model.set_token_chunks(3)
        torch.testing.assert_close(
            latents(pipe, ["a", "b"], guidance=guidance), expected, rtol=1e-3, atol=1e-3
        )
        for model in pipe.transformers:
            model.set_token_chunks(1)
    else:
        for model in pipe.transformers:
            model.to(torch.bfloat16)
        assert latents(pipe, ["a", "b"], guidance=guidance).isfinite().all()
        return
    assert torch.equal(latents(pipe, ["a", "b"], guidance=guidance), expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_callback_that_turns_guidance_off(pipe, name):
    """From the next step on it is the prompt's prediction alone, whatever the formula keeps."""
    guidance = FORMULAS[name]

    def end(pipe, index, timestep, tensors):
        if index == 3:
            pipe._guidance_scale = 0.0
        return {}

    with recording(pipe) as calls:
        cut = latents(pipe, guidance=guidance, callback_on_step_end=end)
    assert cut.isfinite().all() and not torch.equal(cut, latents(pipe, guidance=guidance))
    per_step = Counter(t for name, t in calls if name != "text_encoder")
    last = pipe.scheduler.timesteps[5:].tolist()
    assert name == "several" or [per_step[t] for t in last] == [1] * len(last)


def test_a_callback_that_takes_the_negative_prompt_away(pipe):
    def end(pipe, index, timestep, tensors):
        return {"negative_prompt_embeds": None} if index == 3 else {}

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    cutoff = SDCFGCutoffCallback(cutoff_step_index=3, cutoff_step_ratio=None)
    assert torch.equal(latents(pipe, **options), latents(pipe, callback_on_step_end=cutoff))
    for guidance in (NAG(), Gated()):
        assert latents(pipe, guidance=guidance, **options).isfinite().all()


def test_gating_that_begins_without_guidance(pipe, steps):
    """Where a callback has turned guidance off until then, the first gated step is a full one."""

    def end(pipe, index, timestep, tensors):
        pipe._guidance_scale = 0.0 if index < high + 1 else 3.0
        return {}

    high, low = steps
    with recording(pipe) as calls:
        latents(pipe, guidance=Gated(after=0, refresh=None), callback_on_step_end=end)
    per_step = Counter(t for name, t in calls if name != "text_encoder")
    assert [per_step[t] for t in pipe.scheduler.timesteps.tolist()] == [2] + [1] * (high + 1) + [2] + [1] * (
        low - 3
    )


@pytest.mark.parametrize("guidance", ["nag", SLG], ids=["nag", "slg"])
def test_diffusers_own_models_are_refused(guidance):
    config = dict(random_components()["transformer"].config)
    theirs = diffusers.WanTransformer3DModel.from_config(config)
    pipe = random_pipeline(transformer=theirs)
    with pytest.raises(ValueError, match=r"wan22's own transformer, not .* load it with wan22"):
        latents(pipe, guidance=guidance)
    assert latents(pipe, guidance="apg", num_inference_steps=2).isfinite().all()


def test_what_layers_cannot_do_is_refused(pipe):
    with pytest.raises(ValueError, match="layers=9: the transformer's layers are 0 to 1"):
        latents(pipe, guidance="slg")
    model = copy.deepcopy(random_components()["transformer"])
    other = random_pipeline(transformer=model)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="a step cache counts; call disable_cache"):
        latents(other, guidance=SLG)
    model.disable_cache()
    grouped = copy.deepcopy(model)
    device = torch.device("cpu")
    grouped.enable_group_offload(device, device, "block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="group offloading brings the next before it is called"):
        latents(random_pipeline(transformer=grouped), guidance=SLG)
    model.blocks[0].attn2.set_processor(diffusers.models.transformers.transformer_wan.WanAttnProcessor())
    model.blocks[0].attn2.set_processor(lambda *args: args[1])
    with pytest.raises(ValueError, match="not known to the attention processor function"):
        latents(other, guidance="nag")


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "appg"}, "guidance='appg' must be one of .*; the nearest is 'apg'"),
        ({"guidance_scale": [3.0, 2.0]}, "guidance_scale has 2 values for 8 steps; give 8, or one"),
        ({"guidance_scale": []}, "guidance_scale has 0 values for 8 steps"),
        ({"guidance_scale": [3.0] * 7 + [float("nan")]}, r"guidance_scale\[7\]=nan must be a finite number"),
        ({"guidance_scale": [3.0] * 7 + [0.5]}, r"guidance_scale\[7\]=0.5 must be a number, 1 or more"),
        ({"guidance_scale": "3"}, "guidance_scale='3' must be a number"),
        ({"guidance_scale": lambda sigma: 0.5}, r"guidance_scale\(0.9998\)=0.5 must be a number, 1 or more"),
        ({"guidance_scale": lambda sigma: None}, r"guidance_scale\(0.9998\)=None must be a number"),
        (
            {"guidance_scale": [3.0] * 8, "guidance_scale_2": 2.0},
            "guidance_scale_2=2.0, and guidance_scale has a value for each step; leave guidance_scale_2 out",
        ),
        ({"guidance_interval": (0.5,)}, r"guidance_interval=\(0.5,\) must be two shares of the steps"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5 must be two shares"),
        ({"guidance_interval": (0.9, 0.2)}, r"guidance_interval\[1\]=0.2 must be a number, 0.9 or more"),
        ({"guidance_interval": (0, 20)}, r"guidance_interval\[1\]=20 must be a number, 0 or more, at most 1"),
        ({"guidance_interval": (0.5, 0.51)}, r"guidance_interval=\(0.5, 0.51\) holds none of the 8 steps"),
        (
            {"guidance": NAG(), "guidance_scale": 4.0},
            "guidance_scale=4.0, and guidance='nag' runs at a scale of 1",
        ),
        ({"guidance": NAG(), "guidance_interval": (0, 1)}, "guidance='nag' is on in all steps; leave"),
    ],
)
def test_what_does_not_go_together_is_refused(pipe, options, message):
    with recording(pipe) as calls, pytest.raises(ValueError, match=message):
        latents(pipe, **{"guidance_scale_2": None, **options})
    assert not calls, "before any work"


# ---- the denoiser alone ----


def test_each_expert_begins_anew():
    """What is kept of one expert's predictions is not the other's."""
    generator = torch.Generator().manual_seed(0)
    predicted = [
        {name: torch.randn(2, 4, 1, 3, 3, generator=generator) for name in ("cond", "uncond")}
        for _ in range(4)
    ]
    times = torch.tensor([999.0, 900.0, 500.0, 10.0])
    models = SimpleNamespace(transformer="high", transformer_2="low")
    steps = Experts(models, 875.0).steps(SimpleNamespace(timesteps=times, sigmas=times / 1000))
    embeds = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), torch.zeros(2, 1, 1))
    denoiser = GuidedDenoiser(
        lambda latents, step, passes, videos: predicted[step.index],
        embeds,
        Guidance(APG(), (4.0,) * 4, {}),
        SimpleNamespace(do_classifier_free_guidance=True),
    )
    for step in steps:
        found = denoiser(torch.zeros(2, 4, 1, 3, 3), step)
        video = {name: p[1:] for name, p in predicted[step.index].items()}
        fresh = APG().combine(video, 4.0, step, {})
        assert torch.equal(found[1:], fresh) == (step.index in (0, 2))
