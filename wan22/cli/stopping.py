"""Ctrl-C, and the signals by which a system ends a process: a run ends with its step, and nothing is left."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..accel.parallel.environment import launched

if TYPE_CHECKING:
    from .loading import Pipeline

# SIGTERM is sent by kill, a service manager, a queue at its time limit; SIGHUP when the terminal is closed.
_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_HANDLED = [signal.SIGINT, *_TERMINATING]


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
def stopping(pipe: "Pipeline", say: Callable[[str], None]) -> Iterator[None]:
    """Let the first signal end the run with its step, the second at once; several ranks end at the first."""
    if launched():
        yield
        return
    stopped: list[bool] = []

    def interrupt(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        say("\nstopping after this step, with the video as it is; Ctrl-C once more stops at once")
        pipe.stop()

    with handling(_HANDLED, interrupt):
        yield
