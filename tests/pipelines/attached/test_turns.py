"""Who waits for whom: streams, callbacks, changes of the models, stop and Ctrl-C while others run."""

import contextlib
import copy
import gc
import linecache
import logging
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.accel.offload.recording import RecordingDevice
from tests.accel.planning.test_planner import plan_in
from tests.builders import SMALL, latents_of, random_i2v_pipeline, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, make_lora
from tests.pipelines.attached.test_calls import Threads
from tests.waiting import HANG, until
from wan22 import WanT2VPipeline
from wan22.pipelines.attached import calls
from wan22.pipelines.call import images

LONG = {**SMALL, "num_frames": 17}
WAITING = "waiting for another call to end"


@pytest.fixture
def fitted():
    pipe = copy.deepcopy(random_pipeline())
    pipe.apply(plan_in(pipe, 10**9), RecordingDevice())
    return pipe


def running(begun, go_on):
    """A callback that stays in its first step until it may go on."""

    def callback(pipe, step, timestep, tensors):
        if step == 0:
            begun.set()
            assert go_on.wait(HANG)

    return callback


def half_way(pipe, **arguments):
    """A call that runs in a thread until `go_on` is set; enter the Threads first."""
    begun, go_on = threading.Event(), threading.Event()
    call = lambda: latents_of(pipe, **arguments, callback_on_step_end=running(begun, go_on))  # noqa: E731
    return Threads(call), begun, go_on


# ---- streams ----


def test_a_stream_that_is_half_read_holds_up_no_call(fitted):
    """Its VAE was moved away meanwhile, and comes back for the rest."""
    expected, frames = latents_of(fitted), list(fitted.stream("a", seed=1, **LONG))
    stream = iter(fitted.stream("a", seed=1, **LONG))
    found = [next(stream)]
    with Threads(lambda: latents_of(fitted)) as threads:
        pass
    assert torch.equal(threads.results[0], expected)
    found += [next(stream) for _ in range(3)]
    assert torch.equal(latents_of(fitted), expected), "in the stream's own thread, too"
    with Threads(lambda: [next(stream) for _ in range(5)]) as threads:  # which another one may read
        pass
    assert np.array_equal([*found, *threads.results[0], *stream], frames)
    assert not [use for use in calls._uses]


def test_a_stream_waits_for_calls_that_run(fitted, caplog):
    frames = list(fitted.stream("a", seed=1, **LONG))
    stream = iter(fitted.stream("a", seed=1, **LONG))
    threads, begun, go_on = half_way(fitted)
    with caplog.at_level(logging.INFO), threads:
        assert begun.wait(HANG)
        with Threads(lambda: list(stream)) as reader:
            until(lambda: WAITING in caplog.text)
            assert reader.results == [None]
            go_on.set()
    assert np.array_equal(reader.results[0], frames)


def test_a_stream_that_is_left_frees_the_device_unless_a_call_runs(fitted, monkeypatch):
    freed, end_call = [], fitted.memory.end_call
    monkeypatch.setattr(fitted.memory, "end_call", lambda: (freed.append(threading.get_ident()), end_call()))
    stream = iter(fitted.stream("a", seed=1, **LONG))
    next(stream)
    freed.clear()
    del stream
    gc.collect()
    assert len(freed) == 1
    stream = iter(fitted.stream("a", seed=1, **LONG))
    next(stream)
    freed.clear()
    threads, begun, go_on = half_way(fitted)
    with threads:
        assert begun.wait(HANG)
        stream.close()
        go_on.set()
    assert threading.get_ident() not in freed and len(freed) == 1, "the call does it at its end"
    assert torch.equal(threads.results[0], latents_of(fitted))


def test_strips_that_are_enabled_between_frames_wait_for_the_next_video():
    pipe = copy.deepcopy(random_pipeline())
    frames = list(pipe.stream("a", seed=1, **LONG))
    stream = iter(pipe.stream("a", seed=1, **LONG))
    found = [next(stream)]
    pipe.vae.enable_strips(2)
    assert np.array_equal([*found, *stream], frames)


def test_a_vae_that_is_moved_between_frames_is_told():
    pipe = copy.deepcopy(random_pipeline())
    stream = iter(pipe.stream("a", seed=1, **LONG))
    next(stream)
    pipe.vae.to(torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"the VAE is on cpu in torch\.bfloat16 now, and was on cpu in torch"
    ):
        list(stream)


# ---- what changes models ----


def test_a_lora_waits_until_running_calls_end(caplog):
    pipe = copy.deepcopy(random_pipeline())
    lora, plain = DIALECTS["diffusers"](make_lora(pipe.transformer, 0)), latents_of(pipe)
    threads, begun, go_on = half_way(pipe)
    with caplog.at_level(logging.INFO), threads:
        assert begun.wait(HANG)
        with Threads(lambda: pipe.load_lora_weights(lora), lambda: latents_of(pipe)) as others:
            until(lambda: "the models are changed" in caplog.text)
            assert not any(pipe.get_list_adapters().values())
            go_on.set()
    assert torch.equal(threads.results[0], plain)
    assert others.results[0] == "default_0"
    assert not torch.equal(latents_of(pipe), plain)


def test_a_plan_that_is_made_meanwhile_counts_for_those_who_wait(caplog):
    """They came when the models stayed where they were; now they take turns, on the planned device."""
    pipe = copy.deepcopy(random_pipeline())
    plain = [latents_of(pipe, seed=seed) for seed in (1, 2)]
    threads, begun, go_on = half_way(pipe)
    device = RecordingDevice()
    with caplog.at_level(logging.INFO), threads:
        assert begun.wait(HANG)
        with Threads(lambda: pipe.apply(plan_in(pipe, 10**9), device)) as planning:
            until(lambda: caplog.text.count(WAITING) == 1)
            with Threads(*(lambda s=s: latents_of(pipe, seed=s) for s in (1, 2))) as later:
                until(lambda: caplog.text.count(WAITING) == 3)
                go_on.set()
    assert planning.results == [None]
    assert all(map(torch.equal, later.results, plain))
    assert device.copied()


def test_an_encoder_of_prompts_takes_turns(fitted, caplog):
    expected = fitted.encode_prompt("a")[0]
    threads, begun, go_on = half_way(fitted)
    with caplog.at_level(logging.INFO), threads:
        assert begun.wait(HANG)
        with Threads(lambda: fitted.encode_prompt("a")[0]) as encoding:
            until(lambda: WAITING in caplog.text)
            go_on.set()
    assert torch.equal(encoding.results[0], expected)


def test_a_model_that_was_compiled_is_the_one_beneath(fitted):
    other = WanT2VPipeline.from_pipe(fitted)
    other.transformer = torch.compile(fitted.transformer, backend="eager")
    assert fitted.calls._models() == other.calls._models()


def test_a_callback_changes_models_at_once_if_its_call_is_the_only_one():
    pipe = copy.deepcopy(random_pipeline())
    lora = DIALECTS["diffusers"](make_lora(pipe.transformer, 0))

    def callback(caller, step, timestep, tensors):
        if step == 0:
            caller.load_lora_weights(lora)
            latents_of(caller)

    assert not torch.equal(latents_of(pipe), latents_of(pipe, callback_on_step_end=callback))


def test_callbacks_that_would_wait_for_each_other_are_told():
    """Each would change the models that the other's call uses; the second one is refused."""
    pipe = copy.deepcopy(random_pipeline())
    barrier = threading.Barrier(2)

    def callback(caller, step, timestep, tensors):
        if step == 0:
            barrier.wait(HANG)
            caller.unload_lora_weights()

    refused = []

    def call():
        try:
            return latents_of(pipe, callback_on_step_end=callback)
        except RuntimeError as error:
            refused.append(str(error))

    with Threads(call, call):
        pass
    (told,) = refused
    assert told.startswith("a callback cannot do this now: the models are changed, so that a call in another")
    assert torch.equal(latents_of(pipe), latents_of(random_pipeline()))


# ---- stop ----


def steps_taken(pipe, **arguments):
    steps = []
    callback = lambda caller, step, timestep, tensors: steps.append(step)  # noqa: E731
    latents_of(pipe, **arguments, callback_on_step_end=callback)
    return steps


def test_a_call_that_waits_can_be_stopped(fitted, caplog):
    threads, begun, go_on = half_way(fitted)
    with caplog.at_level(logging.INFO), threads:
        assert begun.wait(HANG)
        with Threads(lambda: steps_taken(fitted)) as waiting:
            until(lambda: WAITING in caplog.text)
            fitted.stop()
            go_on.set()
    assert waiting.results == [[0]]
    assert steps_taken(fitted) == [0, 1, 2], "the next one goes to its end"


def test_a_stop_while_images_are_read_counts(monkeypatch):
    pipe = random_i2v_pipeline()
    opened = images.load_pictures

    def stopping(*arguments):
        stopper = threading.Thread(target=pipe.stop)
        stopper.start()
        stopper.join()
        return opened(*arguments)

    monkeypatch.setattr("wan22.pipelines.i2v.load_pictures", stopping)
    picture = Image.new("RGB", (32, 32))
    assert pipe(picture, "a", seed=1, **SMALL).recipe.steps_done == 1
    monkeypatch.undo()
    assert pipe(picture, "a", seed=1, **SMALL).recipe.steps_done is None


# ---- Ctrl-C ----


def test_ctrl_c_at_any_line_leaves_nothing_that_others_wait_for():
    """Also between those lines of Python's own that enter and leave what a call holds."""
    pipe, where = random_pipeline(), (calls.__file__, contextlib.__file__)

    def interrupted(number):
        """Whether Ctrl-C at the n-th line ends a call."""
        left = number

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename not in where:
                return None
            # A line with `with` comes again when its block is left, where no signal is looked for.
            code = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            left -= event == "line" and not code.lstrip().startswith("with ")
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            with pipe.calls.begin(None) as begun, pipe.calls.in_turn(begun):
                sys.settrace(trace)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    number = 0
    while interrupted(number):
        assert not list(calls._uses) and not list(calls._running), f"line {number}"
        number += 1
    assert number > 50
    with Threads(lambda: pipe.calls._all()) as threads:  # nobody has the lock
        pass
    assert threads.results == [[]]
