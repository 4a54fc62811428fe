"""The calls of a pipeline that run at the same time, in threads of a server, each with a state of its own.

Models that only compute serve any number of threads at once. What keeps something in the models between steps
serves one call after the other, in the order in which they came: hooks that move weights, step caches, LoRA
strengths changed by attention_kwargs, diffusers' VAE. So does what changes models: plans, LoRAs, quantising.
Ranks that share the work would have to agree on that order; they refuse a second call.
"""

import copy
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from ...checkpoints.loading.models import is_ours
from ...private_apis import accelerate_hook, hooks_of_diffusers, uncompiled
from ..call.state import CallState
from .part import Part

logger = logging.getLogger(__name__)

# Entered as it is, not through the condition: Ctrl-C cannot come between its being taken and the block.
_LOCK = threading.RLock()
_CHANGED = threading.Condition(_LOCK)
# Ctrl-C may come between any two lines. A call that it ends there is in these sets no longer than its frames
# are alive; nobody is notified then, so that those who wait look again after so many seconds.
_LOOK_AGAIN = 0.5
_numbers = itertools.count()

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(eq=False)
class ModelUse:
    """A use of models by a thread, among all that run or wait in this process: pipelines may share models."""

    thread: int
    models: frozenset[int] = frozenset()  # their ids
    alone: str | None = None  # why no other thread may use the models meanwhile
    inner: bool = False  # whether the thread uses models already
    running: bool = False  # or else it waits
    number: int = field(default_factory=lambda: next(_numbers))

    def blockers(self) -> list["ModelUse"]:
        """Return the uses of other threads that have to end first.

        These are all that run, and of those that wait the earlier ones; but an inner use is before all that
        wait, for some of them wait for what is around it.
        """
        return [
            other
            for other in sorted(_uses, key=lambda use: use.number)
            if other.thread != self.thread
            and (self.alone or other.alone)
            and self.models & other.models
            and (other.running or (not self.inner and other.number < self.number))
        ]

    def waits_for_itself(self) -> bool:
        """Whether a use that has to end first waits, or those that it waits for do, for this thread."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            threads = {blocker.thread for use in waiting for blocker in use.blockers()} - seen
            if self.thread in threads:
                return True
            seen |= threads
            waiting = [use for use in _uses if use.thread in threads and use.inner and not use.running]
        return False


@dataclass(eq=False)
class RunningCall:
    """A call from its first line on."""

    calls: "Calls"
    thread: int
    state: CallState
    number: int = field(default_factory=lambda: next(_numbers))
    steps: bool = False  # whether its scheduler is in use


_uses: "weakref.WeakSet[ModelUse]" = weakref.WeakSet()
_running: "weakref.WeakSet[RunningCall]" = weakref.WeakSet()


class Calls(Part):
    """The running calls of a pipeline, found by their threads, and the state of the latest one."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a pipeline has made no call

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._latest = CallState()
        self._chosen = threading.local()  # .scheduler: of this thread's next call

    # ---- whose state it is ----

    def _all(self) -> list[RunningCall]:
        """Return this pipeline's running calls, the latest one last."""
        with _LOCK:
            return sorted((c for c in _running if c.calls is self), key=lambda call: call.number)

    @property
    def mine(self) -> CallState | None:
        """The state of the innermost call that runs in this thread."""
        thread = threading.get_ident()
        return next((call.state for call in reversed(self._all()) if call.thread == thread), None)

    @property
    def present(self) -> CallState:
        """The state to read: this thread's call's, or else the latest call's."""
        return self.mine or self._latest

    @property
    def addressed(self) -> list[CallState]:
        """The states to set: this thread's call's; or else those of all that run; or else the latest's."""
        mine = self.mine
        return [mine] if mine else [call.state for call in self._all()] or [self._latest]

    @contextmanager
    def using(self, scheduler: Any) -> Iterator[None]:
        """Let this thread's next call use a scheduler in place of the pipeline's own."""
        self._chosen.scheduler = scheduler
        try:
            yield
        finally:
            self._chosen.__dict__.clear()

    # ---- running ----

    @contextmanager
    def begin(
        self, attention_kwargs: dict[str, Any] | None, scales_loras: bool = False
    ) -> Iterator[RunningCall]:
        """Give a call in this thread its state, in which it can be stopped from now on."""
        scheduler = self._chosen.__dict__.pop("scheduler", self._pipe.scheduler)
        call = RunningCall(self, threading.get_ident(), CallState(scheduler, attention_kwargs, scales_loras))
        try:
            with _LOCK:
                _running.add(call)
            yield call
        finally:
            call.state.end()
            with _LOCK:
                _running.discard(call)

    def started(self, state: CallState) -> None:
        """Make a call, now that its arguments are checked, the latest one."""
        self._latest = state

    @contextmanager
    def in_turn(self, call: RunningCall) -> Iterator[None]:
        """Let a call use the models and its scheduler, once others that have to end first have ended.

        The scheduler is a copy while another call steps it. Not always: after a call, scripts find its
        schedule in the pipeline's own scheduler.
        """
        state = call.state
        with self.using_models(state.scales_loras):
            with _LOCK:
                steppers = (c.state for c in _running if c.steps and c.state.scheduler is state.scheduler)
                other = next(steppers, None)
                call.steps = other is None
            if other is not None:
                with other.stepping:  # who holds it may need the lock above
                    state.scheduler = copy.deepcopy(state.scheduler)
                call.steps = True
            yield

    @contextmanager
    def using_models(
        self,
        scales_loras: bool = False,
        changing: bool = False,
        freeing: bool = False,
    ) -> Iterator[None]:
        """Use, change or free the models, once calls of other threads that have to end first have ended.

        Raises:
            RuntimeError: this is within a call, and one that has to end first waits for this one; or the
                models were freed.
            ValueError: ranks share the work, and another call is running.
        """
        use = ModelUse(threading.get_ident())
        try:
            with _LOCK:
                use.inner = any(other.thread == use.thread for other in _uses)
                self._look(use, scales_loras, changing)
                _uses.add(use)
                if use.blockers():
                    self._wait(use, scales_loras, changing)
                use.running = True
            if not freeing and not use.inner:
                self._pipe.memory.check_weights()
            yield
        finally:
            with _LOCK:
                _uses.discard(use)
                _CHANGED.notify_all()

    def when_idle(self, action: Callable[[], None]) -> None:
        """Do something short with the models, unless they are in use: who uses them does it at the end.

        It registers no use, and never waits: Python may close a stream in the middle of anything.
        """
        if self._reference() is None:  # the pipeline is deleted, with all that it holds
            return
        models = self._models()
        with _LOCK:
            if not any(use.running and use.models & models for use in _uses):
                action()

    def _wait(self, use: ModelUse, scales_loras: bool, changing: bool) -> None:
        if self._pipe.parallel is not None:
            raise ValueError(
                "another call is running in another thread, and ranks share this pipeline's work: they "
                "make one video after the other; begin once it has ended"
            )
        logger.info("waiting for another call to end: %s", use.alone or use.blockers()[0].alone)
        while blockers := use.blockers():
            if use.inner and use.waits_for_itself():
                why = use.alone or blockers[0].alone
                raise RuntimeError(
                    f"a callback cannot do this now: {why}, so that a call in another thread has to end "
                    "first, and that one waits for this one; do it when the call has ended"
                )
            _CHANGED.wait(_LOOK_AGAIN)
            # What ended meanwhile may have changed the models, and what they keep.
            self._look(use, scales_loras, changing)

    def _look(self, use: ModelUse, scales_loras: bool, changing: bool) -> None:
        """Find the models that there are, and whether they serve one call after the other."""
        use.models = self._models()
        use.alone = "the models are changed" if changing else self._why_alone(scales_loras)

    def _models(self) -> frozenset[int]:
        models = (model for model in self._pipe.components.values() if isinstance(model, nn.Module))
        return frozenset(id(uncompiled(model)) for model in models)

    def _why_alone(self, scales_loras: bool) -> str | None:
        """Return what other calls of the same models would disturb; None if there is nothing."""
        pipe = self._pipe
        models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
        if pipe.parallel is not None:
            return "ranks share the work"
        if pipe.memory.moves_models or pipe.memory.plans_next:
            return "a memory plan moves the models"
        if any(accelerate_hook(model) is not None for model in models):
            return "accelerate's hooks move the models"
        if hooks := {name for model in models for name in hooks_of_diffusers(model)}:
            return f"hooks of diffusers are in the models: {', '.join(sorted(hooks))}"
        if scales_loras:
            return "the LoRAs' strengths change"
        if pipe.vae is not None and not is_ours(pipe.vae):
            return "a VAE of diffusers keeps frames in itself while it runs"
        return None


def in_turn(method: Callable[Concatenate[Any, P], Result]) -> Callable[Concatenate[Any, P], Result]:
    """Let a pipeline's method use the models once the calls that have to end first have ended."""

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.calls.using_models():
            return method(self, *args, **kwargs)

    return call
