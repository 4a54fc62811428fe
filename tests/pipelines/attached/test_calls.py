"""Several threads, one pipeline: each call has its own state, and its video is the one it has alone."""

import copy
import logging
import threading

import diffusers
import pytest
import torch

from tests.accel.offload.recording import RecordingDevice
from tests.accel.planning.test_planner import plan_in
from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, make_lora
from tests.waiting import HANG, until
from wan22 import FlowMatchEulerScheduler, WanT2VPipeline

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SCHEDULERS = {
    "unipc": lambda: None,
    "euler": lambda: FlowMatchEulerScheduler(shift=5.0),
    "their unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "stochastic": lambda: diffusers.FlowMatchLCMScheduler(shift=5.0),
}
CALLS = [
    {"prompt": "a red circle", "num_inference_steps": 3, "seed": 1},
    {"prompt": "a green square", "num_inference_steps": 5, "seed": 2, "flow_shift": None},
    {
        "prompt": ["b", "c"],
        "num_inference_steps": 4,
        "seed": 3,
        "guidance_scale": 1.0,
        "guidance_scale_2": 1.0,
    },
]


class Threads:
    """Runs functions in threads of their own; an error in one of them is raised at the end.

    It breaks the barrier at which the others may wait.
    """

    def __init__(self, *functions, barrier=None):
        self.barrier = barrier
        self.results, self.errors = [None] * len(functions), []
        self.threads = [
            threading.Thread(target=self.run, args=(i, function)) for i, function in enumerate(functions)
        ]

    def run(self, i, function):
        try:
            self.results[i] = function()
        except BaseException as error:
            self.errors.append(error)
            if self.barrier is not None:
                self.barrier.abort()

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        for thread in self.threads:
            thread.join(HANG)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


def in_step(barrier, steps):
    """A callback that lets the threads take their first steps one by one, each after the others'."""

    def callback(pipe, step, timestep, tensors):
        if step < steps:
            barrier.wait(HANG)

    return callback


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_calls_at_the_same_time(scheduler):
    own = SCHEDULERS[scheduler]()
    pipe = random_pipeline(**({} if own is None else {"scheduler": own}))
    expected = [latents_of(pipe, **call) for call in CALLS]
    barrier = threading.Barrier(len(CALLS))
    arguments = [{**call, "callback_on_step_end": in_step(barrier, 3)} for call in CALLS]
    with Threads(*(lambda a=a: latents_of(pipe, **a) for a in arguments), barrier=barrier) as threads:
        pass
    for found, alone in zip(threads.results, expected, strict=True):
        assert torch.equal(found, alone)
    assert torch.equal(latents_of(pipe, **CALLS[0]), expected[0]), "nothing is left behind"


def test_a_callback_sees_its_own_call(pipe):
    barrier, seen = threading.Barrier(2), {0: [], 1: []}

    def look(which):
        def callback(caller, step, timestep, tensors):
            barrier.wait(HANG)
            schedule = len(caller.scheduler.timesteps), caller.scheduler.step_index
            scale = caller.guidance_scale, caller.do_classifier_free_guidance
            seen[which].append((caller.num_timesteps, float(caller.current_timestep), *schedule, *scale))
            if which == 1 and step == 0:
                caller._guidance_scale = 0.0
            barrier.wait(HANG)

        return callback

    settings = [{"flow_shift": 2.0}, {"flow_shift": 9.0, "guidance_scale": 4.0}]
    with Threads(
        *(lambda i=i: latents_of(pipe, callback_on_step_end=look(i), **settings[i]) for i in (0, 1))
    ):
        pass
    times = [[999, 799, 499], [999, 947, 817]]
    assert seen[0] == [(3, t, 3, i + 1, 3.0, True) for i, t in enumerate(times[0])]
    assert seen[1] == [(3, t, 3, i + 1, 0.0 if i else 4.0, not i) for i, t in enumerate(times[1])]


@pytest.mark.parametrize("how", ["stop", "_interrupt"])
def test_another_thread_ends_all_calls(pipe, how):
    barrier, steps = threading.Barrier(3), []

    def callback(caller, step, timestep, tensors):
        steps.append(step)
        if step == 0:
            barrier.wait(HANG)
            barrier.wait(HANG)

    with Threads(*(lambda s=s: latents_of(pipe, seed=s, callback_on_step_end=callback) for s in (1, 2))):
        barrier.wait(HANG)
        pipe.stop() if how == "stop" else setattr(pipe, how, True)
        barrier.wait(HANG)
    assert steps == [0, 0]
    assert pipe.interrupt == (how == "_interrupt")


def test_a_callback_ends_its_own_call(pipe):
    barrier, steps = threading.Barrier(2), {0: [], 1: []}

    def callback(which):
        def run(caller, step, timestep, tensors):
            steps[which].append(step)
            if step == 0:
                barrier.wait(HANG)
                caller._interrupt = which == 0
                barrier.wait(HANG)

        return run

    with Threads(*(lambda i=i: latents_of(pipe, callback_on_step_end=callback(i)) for i in (0, 1))):
        pass
    assert steps == {0: [0], 1: [0, 1, 2]}


def test_pipelines_that_share_a_scheduler(pipe):
    """As from_pipe makes them, one per thread."""
    other = WanT2VPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    expected = latents_of(pipe, num_inference_steps=4), latents_of(pipe, seed=2)
    barrier = threading.Barrier(2)
    with Threads(
        lambda: latents_of(pipe, num_inference_steps=4, callback_on_step_end=in_step(barrier, 3)),
        lambda: latents_of(other, seed=2, callback_on_step_end=in_step(barrier, 3)),
    ) as threads:
        pass
    assert all(map(torch.equal, threads.results, expected))


def test_after_a_call_the_scheduler_has_its_schedule(pipe):
    own = pipe.scheduler
    latents_of(pipe, num_inference_steps=4)
    assert pipe.scheduler is own
    assert (own.num_inference_steps, len(own.timesteps), len(own.sigmas)) == (4, 4, 5)


def cast(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def cached(pipe):
    for model in pipe.transformers:
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))


def fitted(pipe):
    pipe.apply(plan_in(pipe, 10**9), RecordingDevice())


def with_lora(pipe):
    pipe.load_lora_weights(DIALECTS["diffusers"](make_lora(pipe.transformer, 0)))


def with_a_vae_of_diffusers(pipe):
    theirs = diffusers.AutoencoderKLWan.from_config(dict(pipe.vae.config)).eval()
    theirs.load_state_dict(pipe.vae.state_dict())
    pipe.vae = theirs


CHANGES = {
    "layerwise casting": (cast, {}, "hooks of diffusers are in the models: layerwise_casting"),
    "step cache": (cached, {}, "hooks of diffusers are in the models: fbc_"),
    "memory plan": (fitted, {}, "a memory plan moves the models"),
    "LoRA": (with_lora, {"attention_kwargs": {"scale": 0.5}}, "the LoRAs' strengths change"),
    "VAE": (with_a_vae_of_diffusers, {}, "a VAE of diffusers keeps frames in itself"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_keep_something_serve_one_call_after_the_other(change, caplog):
    """The second call begins once the first has ended, though it has long been there."""
    pipe = copy.deepcopy(random_pipeline())
    apply, first, why = CHANGES[change]
    apply(pipe)
    second = {"seed": 2, "num_inference_steps": 4}
    expected = latents_of(pipe, **first), latents_of(pipe, **second)
    order, first_runs = [], threading.Event()

    def callback(which):
        def run(caller, step, timestep, tensors):
            order.append(which)
            if which == 0 and step == 0:
                first_runs.set()
                until(lambda: "waiting for another call to end" in caplog.text or 1 in order)

        return run

    def run_second():
        assert first_runs.wait(HANG)
        return latents_of(pipe, **second, callback_on_step_end=callback(1))

    with (
        caplog.at_level(logging.INFO),
        Threads(lambda: latents_of(pipe, **first, callback_on_step_end=callback(0)), run_second) as threads,
    ):
        pass
    assert order == [0] * 3 + [1] * 4
    assert all(map(torch.equal, threads.results, expected))
    assert f"waiting for another call to end: {why}" in caplog.text


def test_ranks_refuse_a_second_call(pipe, monkeypatch):
    """They would have to agree which of two calls comes first."""
    barrier = threading.Barrier(2)

    def first(caller, step, timestep, tensors):
        if step == 0:
            barrier.wait(HANG)
            barrier.wait(HANG)

    monkeypatch.setattr(type(pipe), "parallel", property(lambda pipe: "2 ranks"))
    with Threads(lambda: latents_of(pipe, callback_on_step_end=first)):
        barrier.wait(HANG)
        try:
            with pytest.raises(ValueError, match="running in another thread, and ranks share"):
                latents_of(pipe)
        finally:
            barrier.wait(HANG)
    latents_of(pipe)


def test_a_failed_call_lets_the_next_one_begin(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    try:
        with pytest.raises(ValueError, match="height=100"):
            latents_of(pipe, height=100)
        with Threads(lambda: latents_of(pipe)):
            pass
    finally:
        pipe.transformer.disable_cache()
