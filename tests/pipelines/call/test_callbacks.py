"""What a callback may do to a run, and how a run ends early: stopped, interrupted, or with broken numbers."""

import copy
import functools
import logging

import numpy as np
import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from tests.builders import SMALL, latents_of, random_pipeline, random_ti2v_pipeline, recording
from wan22 import FlowMatchEulerScheduler


def test_called_after_each_step(pipe):
    seen = []

    def callback(caller, step, timestep, tensors):
        seen.append(
            (step, int(timestep), sorted(tensors), int(caller.current_timestep), caller.num_timesteps)
        )
        assert caller is pipe

    latents_of(pipe, callback_on_step_end=callback)
    times = pipe.scheduler.timesteps.tolist()
    assert seen == [(i, t, ["latents"], t, 3) for i, t in enumerate(times)]


def test_gets_the_tensors_it_asks_for(pipe):
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    shapes = {}
    latents_of(
        pipe,
        ["a", "b"],
        callback_on_step_end=lambda p, i, t, tensors: shapes.update(
            {k: tuple(v.shape) for k, v in tensors.items()}
        ),
        callback_on_step_end_tensor_inputs=names,
    )
    assert shapes == {"latents": (2, 16, 2, 4, 4), **dict.fromkeys(names[1:], (2, 512, 32))}


def test_gets_no_negative_embeddings_without_guidance(pipe):
    seen = []
    latents_of(
        pipe,
        guidance_scale=1.0,
        guidance_scale_2=1.0,
        callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["negative_prompt_embeds"]),
        callback_on_step_end_tensor_inputs=["negative_prompt_embeds"],
    )
    assert seen == [None] * 3


def test_a_callback_that_returns_what_it_got_changes_nothing(pipe):
    assert torch.equal(
        latents_of(pipe, callback_on_step_end=lambda p, i, t, tensors: tensors), latents_of(pipe)
    )


def test_may_replace_the_latents():
    """The next step starts from the replacement: with one Euler step left, the result is known."""
    pipe = random_pipeline(scheduler=FlowMatchEulerScheduler())
    start = torch.ones(1, 16, 2, 4, 4)
    arguments = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}
    replaced = latents_of(
        pipe,
        timesteps=[900, 400],
        callback_on_step_end=lambda p, i, t, tensors: {"latents": start} if i == 0 else None,
        **arguments,
    )
    assert torch.equal(replaced, latents_of(pipe, timesteps=[400], latents=start, **arguments))
    last = latents_of(pipe, callback_on_step_end=lambda p, i, t, tensors: {"latents": start})
    assert torch.equal(last, start)


def test_replaced_latents_stay_float32(pipe):
    latents = latents_of(pipe, callback_on_step_end=lambda p, i, t, x: {"latents": x["latents"].half()})
    assert latents.dtype == torch.float32


def test_replaced_latents_of_another_shape(pipe):
    with pytest.raises(
        ValueError, match=r"latents must be .* \(1, 16, 2, 4, 4\), not a float32 tensor of shape \(1,\)"
    ):
        latents_of(pipe, callback_on_step_end=lambda p, i, t, x: {"latents": torch.zeros(1)})


def test_may_replace_the_embeddings(single_pipe):
    """From the second step on, the run goes on as with the other prompt."""
    embeds, negative = single_pipe.encode_prompt("another prompt", "another negative")
    latents = {}

    def swap(p, i, t, tensors):
        latents[i] = tensors["latents"].clone()
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}

    swapped = latents_of(single_pipe, num_inference_steps=2, callback_on_step_end=swap)
    assert torch.equal(latents[1], swapped)
    plain = {}
    latents_of(
        single_pipe,
        num_inference_steps=2,
        callback_on_step_end=lambda p, i, t, x: plain.update({i: x["latents"]}),
    )
    assert torch.equal(latents[0], plain[0])
    assert not torch.equal(latents[1], plain[1])


def test_may_stop_the_run(pipe):
    steps = {}

    def stop(p, i, t, tensors):
        steps[i] = tensors["latents"].clone()
        p._interrupt = i == 1

    stopped = latents_of(pipe, callback_on_step_end=stop)
    assert list(steps) == [0, 1]
    assert torch.equal(stopped, steps[1])
    assert pipe.interrupt
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline())), "the next call runs to its end"


def test_may_replace_or_free_a_model(pipe):
    """The next steps run what is in the slots then, as in diffusers, and nothing else keeps the old model."""
    pipe = copy.deepcopy(pipe)
    timesteps, before = [1000, 900, 400], latents_of(pipe, timesteps=[1000, 900, 400])
    first, second = pipe.transformer, pipe.transformer_2

    def replace(p, i, t, tensors):
        p.transformer_2 = first if i == 0 else p.transformer_2

    def free(p, i, t, tensors):
        p.transformer = None if i == 1 else p.transformer

    replaced = latents_of(pipe, timesteps=timesteps, callback_on_step_end=replace)
    assert torch.equal(replaced, latents_of(pipe, timesteps=timesteps))
    assert not torch.equal(replaced, before)
    pipe.transformer_2 = second
    assert torch.equal(latents_of(pipe, timesteps=timesteps, callback_on_step_end=free), before)
    pipe.transformer = first
    with pytest.raises(ValueError, match=r"timestep 900 is served by the high noise expert.*is None"):
        latents_of(
            pipe, timesteps=timesteps, callback_on_step_end=lambda p, *_: setattr(p, "transformer", None)
        )


def test_frames_that_are_given_stay_as_they_are():
    """TI2V-5B's first frame: what a callback does to it changes no step, as in diffusers."""
    pipe = random_ti2v_pipeline()
    image = np.full((32, 32, 3), 0.7)
    arguments = {**SMALL, "guidance_scale_2": None, "seed": 7, "output_type": "latent"}

    def disturb(p, i, t, tensors):
        tensors["latents"][:, :, 0] = 5.0

    disturbed = pipe(image, "a", callback_on_step_end=disturb, **arguments).frames
    assert torch.equal(disturbed, pipe(image, "a", **arguments).frames)


class CutGuidance(PipelineCallback):
    """Drops the negative embeddings after a step, so that the rest runs without guidance."""

    tensor_inputs = ["negative_prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["negative_prompt_embeds"] = None
        return callback_kwargs


def test_a_callback_object_of_diffusers(pipe):
    callback = CutGuidance(cutoff_step_ratio=None, cutoff_step_index=0)
    with recording(pipe) as calls:
        latents_of(pipe, callback_on_step_end=callback)
    assert len(calls) == 2 + 2 + 1 + 1


def test_several_callback_objects(pipe):
    callback = MultiPipelineCallbacks(
        [CutGuidance(cutoff_step_ratio=None, cutoff_step_index=i) for i in (1, 2)]
    )
    with recording(pipe) as calls:
        latents_of(pipe, callback_on_step_end=callback)
    assert len(calls) == 2 + 2 + 2 + 1


@pytest.mark.parametrize(
    "callback", [SDXLCFGCutoffCallback(), SD3CFGCutoffCallback(), IPAdapterScaleCutoffCallback()]
)
@pytest.mark.parametrize("several", [False, True])
def test_callbacks_for_other_models_are_refused(callback, several, pipe):
    with recording(pipe) as calls, pytest.raises(ValueError, match=r"add_text_embeds|pooled|IP adapter"):
        latents_of(pipe, callback_on_step_end=MultiPipelineCallbacks([callback]) if several else callback)
    assert not calls


def test_a_cut_off_keeps_one_prompt(pipe):
    """diffusers' callback keeps the embeddings of the last prompt alone."""
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with pytest.raises(ValueError, match="prompt_embeds is for 1 prompts; it must be for 2"):
        latents_of(pipe, ["a", "b"], callback_on_step_end=callback)


def test_a_higher_scale_in_a_callback_is_said_to_change_nothing(pipe, caplog):
    def raise_scale(caller, step, timestep, tensors):
        caller._guidance_scale += 1

    with caplog.at_level(logging.WARNING):
        changed = latents_of(pipe, callback_on_step_end=raise_scale)
    assert torch.equal(changed, latents_of(pipe))
    assert caplog.text.count("guidance_scale=4 in a running call changes nothing") == 1
    assert "guidance_scale=5" not in caplog.text
    assert pipe.guidance_scale == 3.0, "the next call has its own"


def test_guidance_cannot_begin_in_a_callback(pipe):
    def switch_on(caller, step, timestep, tensors):
        caller._guidance_scale = 4.0

    with pytest.raises(ValueError, match=r"guidance_scale=4 in a call that began without guidance"):
        latents_of(pipe, callback_on_step_end=switch_on, guidance_scale=1.0, guidance_scale_2=1.0)


def test_guidance_may_come_back_in_a_callback(pipe):
    def skip_one(caller, step, timestep, tensors):
        caller._guidance_scale = 0.0 if step == 0 else 3.0

    with recording(pipe) as calls:
        latents_of(pipe, callback_on_step_end=skip_one)
    assert len(calls) == 2 + 2 + 1 + 2


def test_a_call_in_a_callback(pipe):
    """It disturbs neither the schedule nor the state of the call around it."""
    expected, inner = latents_of(pipe), latents_of(pipe, seed=3, num_inference_steps=2)
    seen = []

    def call_again(caller, step, timestep, tensors):
        if step == 1:
            seen.append(latents_of(caller, seed=3, num_inference_steps=2))
            assert (caller.num_timesteps, int(caller.current_timestep)) == (3, int(timestep))
            assert len(caller.scheduler.timesteps) == 3

    assert torch.equal(latents_of(pipe, callback_on_step_end=call_again), expected)
    assert torch.equal(seen[0], inner)


def test_an_unknown_tensor(pipe):
    with pytest.raises(
        ValueError, match=r"'noise' must be one of 'latents', 'prompt_embeds', 'negative_prompt_embeds'"
    ):
        latents_of(pipe, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["noise"])


# ---- runs that end badly ----


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_pipeline_survives_an_interruption(pipe, error):
    freed = []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)

    def interrupt(p, i, t, tensors):
        if i == 1:
            raise error

    with pytest.raises(error):
        latents_of(pipe, callback_on_step_end=interrupt)
    assert freed == [True]
    assert pipe.current_timestep is None
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline()))
    assert freed == [True, True]


def test_an_interruption_inside_a_model(pipe):
    handle = pipe.transformer_2.blocks[0].register_forward_hook(
        lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            latents_of(pipe)
    finally:
        handle.remove()
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline()))


def poisoned(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim > 1).fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("slot", "step", "timestep", "label"),
    [("transformer", 1, 900, "high noise"), ("transformer_2", 2, 400, "low noise")],
)
def test_broken_numbers_name_step_and_expert(pipe, slot, step, timestep, label):
    broken = random_pipeline(**{slot: poisoned(getattr(pipe, slot))})
    where = rf"timestep {timestep}, {label} expert, pipe\.{slot} in torch\.float32"
    message = rf"not finite after step {step} of 2 \({where}\)"
    with recording(broken) as calls, pytest.raises(FloatingPointError, match=message):
        latents_of(broken, timesteps=[900, 400])
    assert len(calls) == 2 + 2 * step, "the run stops at once"


def test_broken_numbers_of_a_single_transformer(single_pipe):
    broken = random_pipeline(experts=1, transformer=poisoned(single_pipe.transformer))
    with pytest.raises(
        FloatingPointError, match=r"step 1 of 3 \(timestep 999, the only expert, pipe\.transformer"
    ):
        latents_of(broken)


def test_broken_numbers_of_the_vae(pipe):
    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.fill_(float("nan"))
    broken = random_pipeline(vae=vae)
    assert torch.isfinite(latents_of(broken)).all()
    for output_type in ("np", "pil", "pt"):
        with pytest.raises(FloatingPointError, match="VAE's frames are not finite"):
            broken("a", seed=0, output_type=output_type, **SMALL)


def test_attributes_that_diffusers_callbacks_read(pipe):
    assert (pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance) == (0, None, False)
    seen = []

    def look(caller, step, timestep, tensors):
        seen.append((caller.num_timesteps, caller.guidance_scale, caller.do_classifier_free_guidance))

    pipe("a", **SMALL, seed=0, callback_on_step_end=look)
    assert seen == [(3, 3.0, True)] * 3
    assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (4, 8)


def test_attention_kwargs_reach_the_models_as_they_are(pipe):
    """And callbacks. Layers of the caller's own may take tensors."""
    given = {"mask": torch.ones(2)}
    seen = []
    for slot in ("transformer", "transformer_2"):
        model = copy.deepcopy(getattr(pipe, slot))
        model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
        setattr(pipe, slot, model)
    latents_of(
        pipe,
        attention_kwargs=given,
        callback_on_step_end=lambda p, *_: seen.append({"attention_kwargs": p.attention_kwargs}),
    )
    assert [kwargs["attention_kwargs"]["mask"] is given["mask"] for kwargs in seen] == [True] * (6 + 3)


def test_replaced_embeddings_are_checked_and_padded(pipe):
    width = pipe.transformer.config.text_dim

    def give(rows, d):
        embeds = torch.ones(1, rows, d)
        return lambda *_: {"prompt_embeds": embeds}

    run = functools.partial(pipe, "a", **SMALL, seed=0, output_type="latent")
    padded = torch.nn.functional.pad(torch.ones(1, 7, width), (0, 0, 0, 505))
    expected = run(callback_on_step_end=lambda *_: {"prompt_embeds": padded}).frames
    assert torch.equal(run(callback_on_step_end=give(7, width)).frames, expected)
    with pytest.raises(ValueError, match="prompt_embeds has shape"):
        run(callback_on_step_end=give(7, width + 1))
