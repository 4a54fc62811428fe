"""Step caches in calls: exact at threshold 0, per video, per expert, counted, and with what they are used."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.accel.features import CHANGING, SAME, own, streamed
from tests.builders import (
    SMALL,
    bf16_pipeline,
    latents_of,
    random_components,
    random_i2v_pipeline,
    random_pipeline,
    random_ti2v_pipeline,
    recording,
)
from tests.checkpoints.lora_writers import make_lora, save
from tests.golden_data import relative_error
from tests.pipelines.call.caches.loops import CALL, RATIOS, STEPS, cached
from wan22 import EasyCache, FlowMatchEulerScheduler, MagCache, TaylorCache
from wan22.video.labels import labels

NOTHING = {
    "easy": EasyCache(threshold=0, warmup=0),
    "mag": MagCache(threshold=0, warmup=0, ratios=RATIOS),
    "taylor": TaylorCache(interval=1, warmup=0),
}
# Each skips some steps of both experts.
SKIPPING = {
    "easy": EasyCache(threshold=0.3, warmup=0),
    "mag": MagCache(threshold=0.2, warmup=0, ratios=RATIOS),
    "taylor": TaylorCache(interval=3, warmup=0),
}
METHODS = list(SKIPPING)
IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(pipe, cache=None, prompt="a", **arguments):
    """Return the video of a call with an image, where the pipeline takes one."""
    given = {**SMALL, **CALL, "seed": 7, "output_type": "latent", "cache": cache, **arguments}
    if pipe.config.boundary_ratio is None:
        given.pop("guidance_scale_2")
    return pipe(prompt=prompt, **given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["t2v", "i2v", "ti2v"])
def test_what_skips_nothing_changes_no_bit(form, method):
    pipe = {"t2v": random_pipeline, "i2v": random_i2v_pipeline, "ti2v": random_ti2v_pipeline}[form]()
    given = {} if form == "t2v" else {"image": IMAGE}
    exact, video = made(pipe, **given), made(pipe, NOTHING[method], **given)
    assert torch.equal(video.frames, exact.frames)
    assert video.recipe.passes == ((2 * STEPS, 2 * STEPS),) and exact.recipe.passes == ()
    skipped = made(pipe, SKIPPING[method], **given)
    ((computed, of),) = skipped.recipe.passes
    assert computed < of == 2 * STEPS and not torch.equal(skipped.frames, exact.frames)


@pytest.mark.parametrize("method", METHODS)
def test_videos_of_a_batch_are_what_they_are_alone(method):
    pipe, cache = random_pipeline(), SKIPPING[method]
    together = made(pipe, cache, ["a", "two green squares"])
    alone = [made(pipe, cache, "a"), made(pipe, cache, "two green squares", seed=8)]
    assert torch.equal(together.frames, torch.cat([video.frames for video in alone]))
    assert together.recipe.passes == tuple(video.recipe.passes[0] for video in alone)
    assert together.recipe.of(1).passes == alone[1].recipe.passes
    assert torch.equal(made(pipe, cache, "a").frames, alone[0].frames), "nothing stays from call to call"


def test_videos_decide_by_themselves():
    """Of two videos of a batch, one is computed in a step that is skipped for the other."""
    pipe = random_pipeline()
    counts = {made(pipe, EasyCache(threshold=0.2, warmup=0), "a", seed=s).recipe.passes for s in range(3)}
    video = made(pipe, EasyCache(threshold=0.2, warmup=0), ["a"] * 3, seed=[0, 1, 2])
    assert len(counts) > 1, "the test's threshold tells no videos apart"
    assert {(each,) for each in video.recipe.passes} == counts


@pytest.mark.parametrize("method", METHODS)
def test_first_steps_of_experts_and_the_last_one_are_computed(method):
    pipe = random_pipeline()
    with recording(pipe) as plain:
        made(pipe, guidance_scale=1.0, guidance_scale_2=1.0)
    cache = {"easy": EasyCache(1e9, warmup=0), "taylor": TaylorCache(100, warmup=0)}
    cache["mag"] = MagCache(1e9, 100, warmup=0, ratios=RATIOS)
    steps = blocks_run(pipe, lambda: made(pipe, cache[method], guidance_scale=1.0, guidance_scale_2=1.0))
    timesteps = [call for call in plain if call[1] is not None]
    first = [next(call for call in timesteps if call[0] == slot) for slot in ("transformer", "transformer_2")]
    # EasyCache knows a rate from two steps on.
    extra = [timesteps[i + 1] for i in map(timesteps.index, first)] if method == "easy" else []
    assert sorted(steps) == sorted([*first, *extra, timesteps[-1]])


def blocks_run(pipe, run):
    """Return (slot, timestep) of the passes in which blocks run."""
    found, handles = [], []
    for slot in ("transformer", "transformer_2"):
        now = {}

        def before(model, args, kwargs, now=now):
            now["t"] = float(kwargs["timestep"].flatten()[0])

        def inside(block, args, slot=slot, now=now):
            found.append((slot, now["t"]))

        model = getattr(pipe, slot)
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(model.blocks[0].register_forward_pre_hook(inside))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_warm_up_of_each_expert():
    pipe = random_pipeline()
    cache = TaylorCache(interval=100, warmup=(1.0, 0.5))
    steps = blocks_run(pipe, lambda: made(pipe, cache, guidance_scale=1.0, guidance_scale_2=1.0))
    high = sum(slot == "transformer" for slot, _ in steps)
    low = len(steps) - high
    assert high == sum(1 for slot, _ in blocks_run(pipe, lambda: made(pipe)) if slot == "transformer") / 2
    assert low == (STEPS - high) // 2 + 1


@pytest.mark.parametrize("method", METHODS)
def test_passes_that_come_and_go(method):
    """A pass that the last computed step did not have is computed."""
    pipe, scales = random_pipeline(), [3.0 if i % 4 in (0, 1) else 1.0 for i in range(STEPS)]
    given = {"guidance_scale": scales, "guidance_scale_2": None}
    exact, video = made(pipe, **given), made(pipe, SKIPPING[method], **given)
    ((computed, of),) = video.recipe.passes
    assert computed < of == STEPS * 3 // 2
    assert relative_error(video.frames, exact.frames) < 0.5
    assert torch.equal(made(pipe, NOTHING[method], **given).frames, exact.frames)


@pytest.mark.parametrize("method", METHODS)
def test_another_prompt_of_a_callback_is_computed(method):
    """A callback's embeddings are not answered by what is known of those before."""
    pipe = random_pipeline()
    other, _ = pipe.encode_prompt("two green squares")

    def change(pipe, i, t, tensors):
        return {"prompt_embeds": other} if i == STEPS - 4 else {}

    def run(cache):
        given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return blocks_run(pipe, lambda: made(pipe, cache, **given))

    cache = {"easy": EasyCache(1e9, warmup=0), "taylor": TaylorCache(100, warmup=0)}
    cache["mag"] = MagCache(1e9, 100, warmup=0, ratios=RATIOS)
    plain = blocks_run(pipe, lambda: made(pipe))
    after = plain[2 * (STEPS - 3)]
    assert after in run(cache[method])


# ---- with what else changes how models run ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*CHANGING, *(name for name in SAME if name != "strips")])
def test_with_other_accelerations(name, method, tmp_path):
    torch._dynamo.reset()
    pipe = own("t2v")
    lora = save(make_lora(pipe.transformer, 1), tmp_path / "lora.safetensors")
    plain = made(pipe, SKIPPING[method])
    attach = SAME[name][0] if name in SAME else lambda pipe: CHANGING[name](pipe, lora)
    attach(pipe)
    exact, nothing, video = made(pipe), made(pipe, NOTHING[method]), made(pipe, SKIPPING[method])
    assert torch.equal(nothing.frames, exact.frames)
    if name in SAME:
        assert relative_error(video.frames, plain.frames) < 2e-5
        assert video.recipe.passes == plain.recipe.passes
    else:
        assert not torch.equal(video.frames, plain.frames)
    assert torch.equal(made(pipe, SKIPPING[method]).frames, video.frames)


@pytest.mark.parametrize("method", ["mag", "taylor"])
def test_a_skipped_step_streams_nothing(method, monkeypatch):
    from wan22.accel.offload.streaming import BlockBufferPool

    acquired = []
    acquire = BlockBufferPool.acquire
    monkeypatch.setattr(BlockBufferPool, "acquire", lambda self, i: acquired.append(i) or acquire(self, i))
    pipe = own("t2v")
    streamed(pipe)
    for cache, passes in ((None, 2 * STEPS), (SKIPPING[method], None)):
        acquired.clear()
        video = made(pipe, cache)
        passes = passes or video.recipe.passes[0][0]
        streaming = len(pipe.transformer.blocks) - 1
        assert len(acquired) == passes * streaming


@pytest.mark.parametrize("method", METHODS)
def test_samples_in_turn(method):
    pipe = own("t2v")
    cache, prompts = SKIPPING[method], ["a", "two green squares"]
    expected = made(pipe, cache, prompts)
    for model in pipe.transformers:
        model.set_samples_in_turn()
    found = made(pipe, cache, prompts)
    assert torch.equal(found.frames, expected.frames) and found.recipe.passes == expected.recipe.passes


def test_residuals_are_kept_in_the_dtype_of_the_large_layers(monkeypatch):
    from wan22.pipelines.call.caches.mag import MagPredictor

    kept = set()
    keep = MagPredictor.keep
    monkeypatch.setattr(
        MagPredictor, "keep", lambda self, *a: kept.add((a[-1].dtype, tuple(a[-1].shape))) or keep(self, *a)
    )
    made(bf16_pipeline(), SKIPPING["mag"])
    assert kept == {(torch.bfloat16, (1, 2 * 2 * 2, 48))}


def test_progress_and_recipe(capsys):
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=False)
    video = made(pipe, TaylorCache(interval=3, warmup=0.2))
    assert " skipped" in capsys.readouterr().err
    again = type(video.recipe).from_json(video.recipe.to_json())
    assert again == video.recipe and again.passes == video.recipe.passes
    assert again.call["cache"] == {"method": "taylor", "interval": 3, "order": 1, "warmup": 0.2}
    assert torch.equal(pipe.reproduce(again, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("method", METHODS)
def test_reproduce(method):
    pipe = random_pipeline()
    video = made(pipe, SKIPPING[method])
    again = pipe.reproduce(type(video.recipe).from_json(video.recipe.to_json()), output_type="latent")
    assert torch.equal(again.frames, video.frames) and again.recipe.passes == video.recipe.passes


def test_what_is_said_of_a_cache_leaves_its_ratios_out():
    pipe = random_pipeline()
    recipes = [made(pipe, cache).recipe for cache in (None, SKIPPING["mag"])]
    assert labels(recipes) == ["every pass computed", "mag cache, warmup 0, threshold 0.2, most_skips 2"]
    html = recipes[1]._repr_html_()
    assert "0.97" not in html and f"{recipes[1].passes[0][0]} of {2 * STEPS}" in html
    assert "passes" not in recipes[0]._repr_html_()


def test_a_stopped_call_says_what_it_has_computed():
    pipe = random_pipeline()
    video = made(pipe, EasyCache(), callback_on_step_end=lambda pipe, i, *_: pipe.stop() or {})
    assert video.recipe.steps_done == 1 and video.recipe.passes == ((2, 2),)


def test_a_model_that_takes_the_place_of_another():
    """What is kept is the other's: the next step is computed."""
    pipe = random_pipeline(
        **{n: copy.deepcopy(random_components()[n]) for n in ("transformer", "transformer_2")}
    )
    other = copy.deepcopy(pipe.transformer_2)

    def change(pipe, i, *_):
        if i == STEPS - 4:
            pipe.transformer_2 = other
        return {}

    ran = []
    handle = other.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    made(pipe, TaylorCache(interval=100, warmup=0), callback_on_step_end=change)
    handle.remove()
    assert len(ran) == 4, "the first step with it, and the last"


def test_a_solver_that_writes_to_the_latents_changes_nothing_that_is_kept():
    class InPlace(FlowMatchEulerScheduler):
        def step(self, velocity, timestep, latents, return_dict=True):
            (found,) = super().step(velocity, timestep, latents, return_dict=False)
            return (latents.copy_(found),)

    plain, other = (
        cached(random_pipeline(scheduler=cls(shift=5.0)), SKIPPING["easy"])
        for cls in (FlowMatchEulerScheduler, InPlace)
    )
    assert torch.equal(plain, other)


def test_exact_calls_stay_as_they_are():
    pipe = random_pipeline()
    exact = latents_of(pipe)
    made(pipe, replace(SKIPPING["easy"], threshold=1.0))
    assert torch.equal(latents_of(pipe), exact)
