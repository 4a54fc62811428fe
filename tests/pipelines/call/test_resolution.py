"""Parts of a schedule at smaller sizes: the switch's formula, conditions, caches, callbacks."""

import diffusers
import numpy as np
import pytest
import torch

from tests.builders import (
    SMALL,
    latents_of,
    random_i2v_pipeline,
    random_pipeline,
    random_ti2v_pipeline,
    recording,
)
from tests.golden_data import relative_error
from tests.pipelines.test_i2v import photo
from wan22 import (
    EasyCache,
    FlowMatchDPMSolverScheduler,
    FlowMatchEulerScheduler,
    FlowMatchUniPCScheduler,
    MagCache,
    TaylorCache,
)
from wan22.guidance import APG, Gated
from wan22.pipelines.call.images import bicubic, load_picture
from wan22.video.recipe import Recipe

SIZE = {"height": 64, "width": 96, "num_inference_steps": 8}
HALF = [(0.5, 0.5)]


def call(pipe, **arguments):
    given = {**SMALL, **SIZE, "seed": 7, "output_type": "latent", **arguments}
    if pipe.config.boundary_ratio is None:
        given["guidance_scale_2"] = None
    return pipe(prompt="a red circle", **given)


def sigmas(count, shift, start=1.0):
    """The shifted levels of so many steps, and 0, in float32."""
    even = np.linspace(start, 0, count + 1)
    return torch.tensor(shift * even / (1 + (shift - 1) * even), dtype=torch.float32)


def bilinear(x, rows, columns):
    """Latents "b c t h w" at another size: each cell's centre lies between those of four."""
    for axis, count in ((3, rows), (4, columns)):
        old = x.shape[axis]
        at = ((torch.arange(count, dtype=torch.float64) + 0.5) * old / count - 0.5).clamp(0, old - 1)
        below = at.floor().long()
        above, share = (below + 1).clamp(max=old - 1), (at - below).float()
        share = share.reshape([-1 if i == axis else 1 for i in range(5)])
        x = x.index_select(axis, below) * (1 - share) + x.index_select(axis, above) * share
    return x


@torch.no_grad()
def written_out(pipe, parts, count=8, shift=5.0):
    """Euler's method over parts (rows, columns of the latents, index of the first step), by the formula."""
    generator = torch.Generator().manual_seed(7)
    rows, columns, _ = parts[0]
    x = torch.randn(16, 2, rows, columns, generator=generator)[None]
    text = pipe.encode_prompt("a red circle")
    levels = torch.empty(count + 1)
    for raised, (_, _, start) in enumerate(parts):
        levels[start:] = sigmas(count, shift + raised)[start:]
    switches = {start: (rows, columns) for rows, columns, start in parts[1:]}
    for i in range(count):
        t = levels[i] * 1000
        model, scale = (pipe.transformer, 3.0) if t >= 875 else (pipe.transformer_2, 2.0)
        c, u = (model(x, t[None], each, return_dict=False)[0] for each in text)
        v = u + scale * (c - u)
        if i + 1 in switches:
            clean = bilinear(x - levels[i] * v, *switches[i + 1])
            noise = torch.randn(clean.shape[1:], generator=generator)[None]
            x = (1 - levels[i + 1]) * clean + levels[i + 1] * noise
        else:
            x = x + (levels[i + 1] - levels[i]) * v
    return x


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (HALF, [(4, 6, 0), (8, 12, 4)]),
        ([(1, 0.25), (0.5, 0.75)], [(8, 12, 0), (4, 6, 2), (8, 12, 6)]),
        ([(0.5, 0.25), (0.75, 0.5)], [(4, 6, 0), (6, 10, 2), (8, 12, 4)]),
    ],
)
def test_the_switch_follows_its_formula(given, parts):
    pipe = random_pipeline(scheduler=FlowMatchEulerScheduler(shift=5.0))
    with recording(pipe) as calls:
        video = call(pipe, resolution_schedule=given)
    assert {name for name, _ in calls} >= {"transformer", "transformer_2"}
    assert relative_error(video.frames, written_out(pipe, parts)) < 1e-5
    starts = [start for _, _, start in parts] + [8]
    expected = [(8 * w, 8 * h, b - a) for (h, w, a), b in zip(parts, starts[1:], strict=True)]
    assert video.recipe.sizes == tuple(expected)


SOLVERS = {
    "unipc": (FlowMatchUniPCScheduler, {}),
    "dpm++": (FlowMatchDPMSolverScheduler, {}),
    "diffusers": (
        diffusers.UniPCMultistepScheduler,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_begin_anew_at_the_switch(name):
    """The steps after it are those of a solver that starts there, with the raised shift."""
    cls, settings = SOLVERS[name]
    shift = "flow_shift" if name == "diffusers" else "shift"
    pipe, seen = random_pipeline(1, scheduler=cls(**{shift: 5.0}, **settings)), []

    def see(pipe, index, timestep, tensors):
        seen.append(tensors["latents"].clone())

    call(pipe, resolution_schedule=HALF, callback_on_step_end=see)
    solver = cls(**{shift: 6.0}, **settings)
    solver.set_timesteps(8)
    solver.set_begin_index(4)
    assert [tuple(x.shape[3:]) for x in seen] == [(4, 6)] * 3 + [(8, 12)] * 5
    x, text = seen[3], pipe.encode_prompt("a red circle")
    for t, expected in zip(solver.timesteps[4:], seen[4:], strict=True):
        with torch.no_grad():
            c, u = (pipe.transformer(x, t[None], each, return_dict=False)[0] for each in text)
        x = solver.step(u + 3.0 * (c - u), t, x, return_dict=False)[0]
        assert relative_error(expected, x) < 1e-5


def test_one_size_is_no_schedule():
    pipe = random_pipeline()
    plain = call(pipe)
    video = call(pipe, resolution_schedule=[(1.0, 0.3), (1, 0.6)])
    assert torch.equal(video.frames, plain.frames) and video.recipe.sizes == plain.recipe.sizes == ()


def test_batches_recipes_and_names(tmp_path):
    pipe = random_pipeline()
    video = call(pipe, resolution_schedule="coarse-to-fine")
    assert video.recipe.call["resolution_schedule"] == [[0.75, 0.5]]
    assert video.recipe.sizes == ((80, 48, 4), (96, 64, 4)) and "4 at 80x48, 4 at 96x64" in str(video.recipe)
    assert "4 at 80x48" in video.recipe._repr_html_()
    two = pipe(
        ["b", "a red circle"],
        **{**SMALL, **SIZE},
        seed=[3, 7],
        output_type="latent",
        resolution_schedule="[[0.75, 0.5]]",
    )
    assert torch.equal(two.frames[1:], video.frames)
    recipe = Recipe.from_json(video.recipe.to_json())
    assert recipe.sizes == video.recipe.sizes
    assert torch.equal(pipe.reproduce(recipe, output_type="latent").frames, video.frames)
    other = pipe.reproduce(recipe, output_type="latent", resolution_schedule=None)
    assert not torch.equal(other.frames, video.frames) and other.recipe.sizes == ()


def test_the_pipelines_scheduler_is_left_with_the_calls_own_schedule():
    pipe = random_pipeline()
    call(pipe)
    expected = pipe.scheduler.sigmas.clone()
    call(pipe, resolution_schedule=HALF)
    assert torch.equal(pipe.scheduler.sigmas, expected)


# ---- images ----


def inputs_of(model, seen):
    def see(module, arguments, kwargs):
        seen.append({n: v.clone() for n, v in kwargs.items() if isinstance(v, torch.Tensor)})

    return model.register_forward_pre_hook(see, with_kwargs=True)


def test_channels_are_encoded_at_each_size():
    pipe, seen = random_i2v_pipeline(), []
    image = photo(120, 64)  # cropped to 96x64, whose middle the smaller one shows, too
    handles = [inputs_of(model, seen) for model in pipe.transformers]
    try:
        video = call(pipe, image=image, resolution_schedule=HALF)
    finally:
        for handle in handles:
            handle.remove()
    middle = image.crop((12, 0, 108, 64))
    expected = {}
    for w, h in ((96, 64), (48, 32)):
        pixels = bicubic(load_picture("image", middle), (w, h)).pixels[None]
        expected[h // 8, w // 8] = pipe.prepare_latents(pixels, 1, 16, h, w, 5)[1]
    given = [each["hidden_states"] for each in seen]
    assert [tuple(x.shape[3:]) for x in given] == [(4, 6)] * 8 + [(8, 12)] * 8
    for x in given:
        assert torch.equal(x[:, 16:], expected[tuple(x.shape[3:])])
    assert torch.equal(pipe.reproduce(video.recipe, image=image, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("two_frames", [False, True])
def test_clip_tokens_are_those_of_the_image(two_frames):
    pipe, seen = random_i2v_pipeline(1, two_frames), []
    images = {"image": photo(96, 64)} | ({"last_image": photo(96, 64, 1)} if two_frames else {})
    handle = inputs_of(pipe.transformer, seen)
    try:
        call(pipe, **images, resolution_schedule=HALF)
    finally:
        handle.remove()
    tokens = [each["encoder_hidden_states_image"] for each in seen]
    assert len(tokens) == 16 and all(torch.equal(each, tokens[0]) for each in tokens)


def test_the_first_frame_stays_clean_at_each_size():
    pipe, seen = random_ti2v_pipeline(), []
    image, size = photo(128, 64), {"width": 128, "height": 64}
    handle = inputs_of(pipe.transformer, seen)
    try:
        video = call(pipe, **size, image=image, resolution_schedule=HALF)
    finally:
        handle.remove()
    assert video.recipe.sizes == ((64, 32, 4), (128, 64, 4))
    assert all((each["timestep"][:, 0] == 0).all() and (each["timestep"][:, 1:] > 0).all() for each in seen)
    exact = call(pipe, **size, image=image)
    assert torch.equal(video.frames[:, :, :1], exact.frames[:, :, :1])
    small, full = seen[0]["hidden_states"], seen[-1]["hidden_states"]
    assert small.shape[3:] == (2, 4) and torch.equal(full[:, :, :1], exact.frames[:, :, :1])
    assert torch.equal(small[:, :, :1], seen[7]["hidden_states"][:, :, :1])


# ---- what keeps things from step to step ----


def computed(pipe, **arguments):
    """Whether blocks run at each step, by the timestep that the prompt's pass has."""
    found, last = [], []

    def begin(module, args, kwargs):
        last.append(float(kwargs["timestep"].flatten()[0]))

    def run(module, args):
        found.append(last[-1])

    handles = [pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True)]
    handles.append(pipe.transformer.blocks[0].register_forward_pre_hook(run))
    try:
        video = call(pipe, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return video, found


@pytest.mark.parametrize(
    "cache",
    [
        EasyCache(10.0, warmup=0),
        MagCache(10.0, most_skips=9, warmup=0, ratios={"ratios": {"transformer": [1.0, 0.9]}}),
        TaylorCache(9, warmup=0),
    ],
    ids=lambda cache: cache.method,
)
def test_caches_keep_nothing_over_a_switch(cache):
    pipe = random_pipeline(1)
    video, found = computed(pipe, resolution_schedule=HALF, cache=cache, guidance_scale=1.0)
    exact, every = computed(pipe, resolution_schedule=HALF, guidance_scale=1.0)
    assert len(every) == 8 and {every[0], every[4], every[7]} <= set(found) and len(found) < 8
    assert video.frames.isfinite().all() and not torch.equal(video.frames, exact.frames)
    nothing = (
        type(cache)(**({"interval": 1} if cache.method == "taylor" else {"threshold": 0}), warmup=0)
        if (cache.method != "mag")
        else MagCache(0, warmup=0, ratios=cache.ratios)
    )
    assert torch.equal(
        call(pipe, resolution_schedule=HALF, cache=nothing, guidance_scale=1.0).frames, exact.frames
    )


def test_gated_guidance_measures_the_difference_anew():
    pipe = random_pipeline(1)
    _, found = computed(pipe, resolution_schedule=HALF, guidance=Gated(after=0.125, refresh=None))
    counts = [found.count(t) for t in dict.fromkeys(found)]
    assert counts == [2, 1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    "guidance",
    [
        APG(momentum=-0.5),
        diffusers.guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
    ],
    ids=["apg", "diffusers"],
)
def test_formulas_keep_nothing_over_a_switch(guidance):
    """What they keep has another shape: the step after the switch begins anew."""
    pipe, seen = random_pipeline(1), []

    def see(pipe, index, timestep, tensors):
        seen.append(tensors["latents"])

    scale = {"guidance_scale": None} if not isinstance(guidance, APG) else {}
    video = call(pipe, resolution_schedule=HALF, callback_on_step_end=see, guidance=guidance, **scale)
    assert video.frames.isfinite().all() and len(seen) == 8


def test_ratios_are_those_of_the_experts_steps():
    """Though its steps are at two sizes, a place among them stays what it was."""
    pipe = random_pipeline(1)
    given = {"transformer": [1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0]}
    cache = MagCache(0.5, most_skips=9, warmup=0, ratios={"ratios": given})
    _, found = computed(pipe, resolution_schedule=HALF, cache=cache, guidance_scale=1.0)
    every = list(dict.fromkeys(computed(pipe, resolution_schedule=HALF, guidance_scale=1.0)[1]))
    assert [every.index(t) for t in found] == [0, 4, 5, 7]


def test_calibrating_measures_within_a_size():
    ratios = random_pipeline(1).calibrate_cache(
        "a", **{**SMALL, **SIZE, "guidance_scale_2": None}, seed=1, resolution_schedule=HALF
    )
    values = ratios.ratios["transformer"]
    assert len(values) == 8 and values[0] == values[4] == 1.0 and values[3] != 1.0


# ---- what else a call does ----


def test_given_latents_have_the_first_size():
    pipe = random_pipeline()
    video = call(pipe, resolution_schedule=HALF)
    noise = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(7))[None]
    given = latents_of(pipe, **SIZE, latents=noise, resolution_schedule=HALF)
    assert given.shape == video.frames.shape
    with pytest.raises(ValueError, match=r"shape \(1, 16, 2, 4, 6\)"):
        latents_of(pipe, **SIZE, latents=torch.randn(1, 16, 2, 8, 12), resolution_schedule=HALF)


@pytest.mark.parametrize("how", ["stop", "_interrupt"])
def test_a_call_that_is_stopped_has_the_size_it_was_asked_for(how):
    pipe, seen = random_pipeline(), []

    def stop(pipe, index, timestep, tensors):
        if index == 1:
            pipe.stop() if how == "stop" else setattr(pipe, how, True)
        seen.append(tensors["latents"])

    video = call(pipe, resolution_schedule=HALF, callback_on_step_end=stop, output_type="np")
    assert len(seen) == 2 and seen[-1].shape[3:] == (4, 6)
    assert video.frames.shape == (1, 5, 64, 96, 3)


def test_callbacks_may_replace_latents_and_previews_follow_the_size():
    pipe, shown = random_pipeline(), []

    def replace(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] + 0.0}

    plain = call(pipe, resolution_schedule=HALF)
    video = call(
        pipe,
        resolution_schedule=HALF,
        callback_on_step_end=replace,
        preview=lambda preview: shown.append(preview.frames.shape[1:3]),
        preview_every=1,
    )
    assert torch.equal(video.frames, plain.frames)
    assert shown == [(4, 6)] * 4 + [(8, 12)] * 4


def test_a_stream():
    pipe = random_pipeline()
    arguments = {**SMALL, **SIZE, "seed": 7, "resolution_schedule": HALF}
    frames = list(pipe.stream("a", **arguments))
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3)
    assert np.array_equal(np.stack(frames), pipe("a", **arguments).as_uint8()[0])


def test_a_memory_plan_has_room():
    pipe = random_pipeline()
    plain = call(pipe, resolution_schedule=HALF)
    pipe.fit(device="cpu", height=64, width=96, num_frames=5)
    plan = pipe.memory_plan
    video = call(pipe, resolution_schedule=HALF)
    assert pipe.memory_plan is plan
    assert relative_error(video.frames, plain.frames) < 1e-5
