"""The same answers as diffusers' WanPipeline, given the same schedule, noise and embeddings."""

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from tests.builders import SMALL, latents_of, random_pipeline, recording
from tests.golden_data import relative_error
from wan22 import FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler, FlowMatchUniPCScheduler

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
THEIRS = {
    "unipc": lambda shift: diffusers.UniPCMultistepScheduler(flow_shift=shift, **FLOW),
    "dpm++": lambda shift: diffusers.DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
    "euler": lambda shift: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
}
OURS = [FlowMatchUniPCScheduler, FlowMatchDPMSolverScheduler, FlowMatchEulerScheduler]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines of T2V-A14B's and of TI2V-5B's form."""
    root = tmp_path_factory.mktemp("parity")
    forms = {"t2v": {}, "ti2v": {"experts": 1, "channels": 48}}
    for name, form in forms.items():
        random_pipeline(**form).save_pretrained(root / name)
    return {name: (root / name, form) for name, form in forms.items()}


def their_pipeline(folder, **components):
    pipe = diffusers.WanPipeline.from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(ours, **changed):
    """The arguments of one call that both pipelines take."""
    embeds, negative = ours.encode_prompt(["a red circle", "b"], "fog")
    noise = torch.randn(2, *ours.latent_shape(5, 32, 32), generator=torch.Generator().manual_seed(3))
    arguments = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "latents": noise,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        **changed,
    }
    if ours.config.boundary_ratio is not None:
        arguments["guidance_scale_2"] = 2.0
    return arguments


@pytest.mark.parametrize("form", ["t2v", "ti2v"])
@pytest.mark.parametrize("solver", OURS)
def test_our_scheduler_in_their_pipeline(solver, form, folders):
    folder, form = folders[form]
    ours = random_pipeline(**form, scheduler=solver(shift=5.0))
    theirs = their_pipeline(folder, scheduler=solver(shift=5.0))
    arguments = inputs(ours, output_type="latent")
    mine = ours(**arguments).frames
    assert relative_error(mine, theirs(**arguments).frames) <= 1e-5
    assert mine.std() > 0.5


def test_their_unipc_with_our_sigmas(folders):
    """Fed the official noise levels, diffusers' solver takes the same steps."""
    ours = random_pipeline()
    theirs = their_pipeline(folders["t2v"][0])
    arguments = inputs(ours, output_type="latent")
    mine = ours(**arguments).frames
    sigmas = ours.scheduler.sigmas[:-1].double().numpy()
    set_timesteps = theirs.scheduler.set_timesteps

    def fed(num_inference_steps, device=None):
        # diffusers shifts what it is given, so the shift is taken out first.
        set_timesteps(device=device, sigmas=sigmas / (5.0 - 4.0 * sigmas))
        theirs.scheduler.timesteps = ours.scheduler.timesteps.clone()

    theirs.scheduler.set_timesteps = fed
    assert theirs.scheduler.config.flow_shift == 5.0
    assert relative_error(mine, theirs(**arguments).frames) <= 1e-5


def test_decoded_frames(folders):
    folder, _ = folders["t2v"]
    ours, theirs = random_pipeline(), their_pipeline(folder, scheduler=FlowMatchUniPCScheduler(shift=5.0))
    arguments = inputs(ours, output_type="pt")
    assert relative_error(ours(**arguments).frames, theirs(**arguments).frames) <= 1e-5


def test_text(folders):
    """diffusers' encoder with 512 tokens gives the embeddings that ours gives on the real tokens alone."""
    ours, theirs = random_pipeline(), their_pipeline(folders["t2v"][0])
    for mine, other in zip(
        ours.encode_prompt("a  red &amp;amp; blue circle", "fog"),
        theirs.encode_prompt("a  red &amp;amp; blue circle", "fog", max_sequence_length=512),
        strict=True,
    ):
        assert relative_error(mine, other) <= 2e-6
        assert torch.equal(mine == 0, other == 0)


@pytest.mark.parametrize("solver", THEIRS)
def test_their_scheduler_in_our_pipeline(solver, folders):
    ours = random_pipeline(scheduler=THEIRS[solver](5.0))
    theirs = their_pipeline(folders["t2v"][0], scheduler=THEIRS[solver](5.0))
    arguments = inputs(ours, output_type="latent")
    video = ours(**arguments)
    assert relative_error(video.frames, theirs(**arguments).frames) <= 1e-5
    assert video.recipe.scheduler == type(ours.scheduler).__name__
    assert video.recipe.flow_shift == 5.0


def set_scale(change):
    """A callback that changes pipe._guidance_scale after the first step."""

    def callback(pipe, step, timestep, tensors):
        if step == 0:
            pipe._guidance_scale = change(pipe._guidance_scale)
        return tensors

    return callback


CALLBACKS = {
    "raised": lambda: set_scale(lambda scale: scale + 4),
    "off": lambda: set_scale(lambda scale: 1.0),
    "below": lambda: set_scale(lambda scale: -1),
    "cutoff": lambda: SDCFGCutoffCallback(cutoff_step_ratio=0.5),
    "index": lambda: MultiPipelineCallbacks(
        [SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)]
    ),
}


@pytest.mark.parametrize("form", ["t2v", "ti2v"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_guidance_changed_in_a_callback(callback, form, folders):
    folder, form = folders[form]
    ours = random_pipeline(**form, scheduler=THEIRS["euler"](5.0))
    theirs = their_pipeline(folder, scheduler=THEIRS["euler"](5.0))
    arguments = inputs(ours, output_type="latent")
    for name in ("prompt_embeds", "negative_prompt_embeds", "latents"):
        arguments[name] = arguments[name][:1]  # a cut-off keeps the last prompt's embeddings alone
    mine = ours(**arguments, callback_on_step_end=CALLBACKS[callback]())
    expected = theirs(**arguments, callback_on_step_end=CALLBACKS[callback]())
    assert relative_error(mine.frames, expected.frames) <= 1e-5
    assert ours.guidance_scale == theirs.guidance_scale
    assert ours.do_classifier_free_guidance == theirs.do_classifier_free_guidance
    assert mine.recipe.not_reproducible_because is not None
    assert torch.equal(mine.frames, ours(**arguments).frames) == (callback == "raised")


@pytest.mark.parametrize("solver", THEIRS)
def test_flow_shift_of_their_scheduler(solver):
    given = random_pipeline(scheduler=THEIRS[solver](5.0))
    configured = random_pipeline(scheduler=THEIRS[solver](9.0))
    reference = latents_of(configured, flow_shift=None)
    assert torch.equal(latents_of(given, flow_shift=9.0), reference)
    assert not torch.equal(latents_of(given, flow_shift=None), reference), "the pipeline's own shift stays"


@pytest.mark.parametrize("solver", THEIRS)
def test_their_scheduler_is_ready_for_the_next_call(solver):
    pipe = random_pipeline(scheduler=THEIRS[solver](5.0))
    first = latents_of(pipe)
    latents_of(pipe, num_inference_steps=2)
    assert torch.equal(latents_of(pipe), first)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_custom_sigmas_of_their_scheduler(solver):
    """They are used as they are, as with our schedulers: diffusers alone would shift them."""
    ours = {"unipc": FlowMatchUniPCScheduler, "euler": FlowMatchEulerScheduler}[solver]
    pipe = random_pipeline(scheduler=THEIRS[solver](5.0))
    expected = latents_of(random_pipeline(scheduler=ours()), sigmas=[0.98, 0.9, 0.5])
    assert relative_error(latents_of(pipe, sigmas=[0.98, 0.9, 0.5]), expected) <= 1e-5


def test_custom_timesteps_of_their_scheduler():
    pipe = random_pipeline(scheduler=THEIRS["euler"](5.0))
    expected = latents_of(random_pipeline(scheduler=FlowMatchEulerScheduler()), timesteps=[980, 900, 500])
    assert relative_error(latents_of(pipe, timesteps=[980, 900, 500]), expected) <= 1e-5


def test_a_custom_schedule_is_the_whole_schedule():
    pipe = random_pipeline(scheduler=THEIRS["euler"](5.0))
    for contradiction in ({"flow_shift": 3.0}, {"num_inference_steps": 4}, {"timesteps": [900, 500]}):
        arguments = {**SMALL, "num_inference_steps": None, "flow_shift": None, **contradiction}
        with pytest.raises(ValueError, match="leave num_inference_steps and flow_shift out"):
            pipe("a", sigmas=[0.9, 0.5], **arguments)


@pytest.mark.parametrize(
    ("solver", "name"), [("unipc", "timesteps"), ("dpm++", "sigmas"), ("dpm++", "timesteps")]
)
def test_a_schedule_that_their_scheduler_does_not_take(solver, name):
    pipe = random_pipeline(scheduler=THEIRS[solver](5.0))
    values = [900, 500] if name == "timesteps" else [0.9, 0.5]
    with recording(pipe) as calls, pytest.raises(ValueError, match=rf"Scheduler takes no {name}"):
        pipe("a", **{**SMALL, "num_inference_steps": None, "flow_shift": None}, **{name: values})
    assert not calls
