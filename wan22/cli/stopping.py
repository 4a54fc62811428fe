"""Ctrl-C, and the signals by which a system ends a process: a run ends with its step, and nothing is left."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..accel.parallel.environment import launched

# SIGTERM is sent by kill, a service manager, a queue at its time limit; SIGHUP when the terminal is closed.
_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_HANDLED = [signal.SIGINT, *_TERMINATING]


class Stoppable(Protocol):
    """What can end after its present step: a pipeline's call, a training."""

    def stop(self) -> None:
        """Let it end so."""
        ...


@contextmanager
def handling(signals: list[signal.Signals], handler: Callable[..., Any]) -> Iterator[None]:
    """Let a function handle signals; only a process's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # nohup's process ignores SIGHUP, and goes on to.
    before = {s: old for s in signals if (old := signal.getsignal(s)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def until_terminated() -> Iterator[None]:
    """Let a signal to terminate raise KeyboardInterrupt, so that files that are half written are removed."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with handling(_TERMINATING, interrupt):
        yield


@contextmanager
def stopping(
    run: Stoppable, say: Callable[[str], None], then: str = "with the video as it is"
) -> Iterator[None]:
    """Let the first signal end a run with its step, the second at once; several ranks end at the first.

    `then` says what becomes of the run.
    """
    if launched():
        yield
        return
    stopped: list[bool] = []

    def interrupt(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        say(f"\nstopping after this step, {then}; Ctrl-C once more stops at once")
        run.stop()

    with handling(_HANDLED, interrupt):
        yield
