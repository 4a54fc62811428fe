"""The calls of a pipeline that run at the same time, in threads of a server, each with a state of its own.

Models that only compute serve any number of threads at once. What keeps something in the models between steps
serves one call after the other, in the order in which they came: hooks that move weights, step caches, LoRA
strengths changed by attention_kwargs, diffusers' VAE. Ranks that share the work would have to agree on that
order; they refuse a second call.
"""

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...checkpoints.loading.models import is_ours
from ...private_apis import accelerate_hook, hooks_of_diffusers
from ..call.state import CallState
from .part import Part

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ModelUse:
    """A call's use of models, among all that run or wait in this process: pipelines may share models."""

    thread: int
    models: frozenset[int]  # their ids
    alone: str | None  # why no other call may use the models meanwhile

    def waits_for(self, earlier: "ModelUse") -> bool:
        """Whether an earlier call has to end first."""
        return bool((self.alone or earlier.alone) and self.models & earlier.models)


_CHANGED = threading.Condition()
_uses: list[ModelUse] = []  # in the order in which they came
_states: list[CallState] = []  # of all running calls: their schedulers are in use


class Calls(Part):
    """The running calls of a pipeline, found by their threads, and the state of the latest one."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a pipeline has made no call

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._running: list[tuple[int, CallState]] = []  # with their threads
        self._latest = CallState()
        self._chosen = threading.local()  # .scheduler: of this thread's next call

    # ---- whose state it is ----

    @property
    def mine(self) -> CallState | None:
        """The state of the innermost call that runs in this thread."""
        thread = threading.get_ident()
        # A copy, which other threads leave alone.
        return next((state for ident, state in reversed(tuple(self._running)) if ident == thread), None)

    @property
    def present(self) -> CallState:
        """The state to read: this thread's call's, or else the latest call's."""
        return self.mine or self._latest

    @property
    def addressed(self) -> list[CallState]:
        """The states to set: this thread's call's; or else those of all that run; or else the latest's."""
        mine = self.mine
        return [mine] if mine else [state for _, state in tuple(self._running)] or [self._latest]

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
    def begin(self, attention_kwargs: dict[str, Any] | None) -> Iterator[CallState]:
        """Let a call run in this thread, once those that it has to wait for have ended."""
        scheduler = self._chosen.__dict__.pop("scheduler", self._pipe.scheduler)
        with self.using_models(attention_kwargs), self._state_with(scheduler, attention_kwargs) as state:
            entry = threading.get_ident(), state
            self._running.append(entry)
            try:
                yield state
            finally:
                state.end()
                self._running.remove(entry)

    def started(self, state: CallState) -> None:
        """Make a call, now that its arguments are checked, the latest one."""
        self._latest = state

    @contextmanager
    def using_models(self, attention_kwargs: dict[str, Any] | None = None) -> Iterator[None]:
        """Use the models, once the calls that have to end first have ended; within a call, at once."""
        pipe = self._pipe
        models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
        alone = self._why_alone(models, attention_kwargs)
        use = ModelUse(threading.get_ident(), frozenset(map(id, models)), alone)
        with _CHANGED:
            inside = any(other.thread == use.thread for other in _uses)
            earlier = [] if inside else [other for other in _uses if use.waits_for(other)]
            if earlier and pipe.parallel is not None:
                raise ValueError(
                    "another call is running in another thread, and ranks share this pipeline's work: they "
                    "make one video after the other; begin once it has ended"
                )
            _uses.append(use)
        try:
            if earlier:
                logger.info("waiting for another call to end: %s", use.alone or earlier[0].alone)
                with _CHANGED:
                    _CHANGED.wait_for(lambda: not any(other in _uses for other in earlier))
            yield
        finally:
            with _CHANGED:
                _uses.remove(use)
                _CHANGED.notify_all()

    def _why_alone(self, models: list[nn.Module], attention_kwargs: dict[str, Any] | None) -> str | None:
        """Return what other calls of the same models would disturb; None if there is nothing."""
        pipe = self._pipe
        if pipe.parallel is not None:
            return "ranks share the work"
        if pipe.memory.moves_models or pipe.memory.plans_next:
            return "a memory plan moves the models"
        if any(accelerate_hook(model) is not None for model in models):
            return "accelerate's hooks move the models"
        if hooks := {name for model in models for name in hooks_of_diffusers(model)}:
            return f"hooks of diffusers are in the models: {', '.join(sorted(hooks))}"
        if attention_kwargs and attention_kwargs.get("scale") is not None:
            return "attention_kwargs change the LoRAs' strengths"
        if pipe.vae is not None and not is_ours(pipe.vae):
            return "a VAE of diffusers keeps frames in itself while it runs"
        return None

    @contextmanager
    def _state_with(self, scheduler: Any, attention_kwargs: dict[str, Any] | None) -> Iterator[CallState]:
        """Yield a call's state, whose scheduler is the given one, or a copy while another call steps it.

        Not always a copy: after a call, scripts find its schedule in the pipeline's own scheduler.
        """
        with _CHANGED:
            other = next((state for state in _states if state.scheduler is scheduler), None)
            if other is not None:
                with other.stepping:
                    scheduler = copy.deepcopy(scheduler)
            state = CallState(scheduler, attention_kwargs)
            _states.append(state)
        try:
            yield state
        finally:
            with _CHANGED:
                _states.remove(state)
