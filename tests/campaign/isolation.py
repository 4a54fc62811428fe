"""A trial in a process of its own, and how it ended."""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan22.prompts import ChatError

SECONDS_OF_CPU, SECONDS, BYTES = 20, 60, 2e9
LONGEST = 1500  # characters of an error
# How a trial ends: as it should, or in one of the faults.
FAULTS = {
    "accepted": "accepted silently",
    "bare": "bare error",
    "unclear": "error without a name, of several lines, or long",
    "hang": "hang",
    "memory": "memory",
    "crash": "crash",
    "code": "code run, or a server asked",
}


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Args:
        run: called in a process of its own; returns None, or what is wrong with what it found.
        name: what an error must say, the file's name as a rule.
        may_start: programs that it may start.
    """

    run: Callable[[], str | None]
    name: str
    may_start: tuple[str, ...] = ("ffmpeg",)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: "right", or a key of FAULTS, and what was seen."""

    verdict: str
    seen: str = ""


def isolated(trial: Trial) -> Outcome:
    """Run a trial in a forked process, within limits of time and memory."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        _run(trial, writing)
    os.close(writing)
    try:
        return _watched(process, reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _watched(process: int, reading: int) -> Outcome:
    text, least = b"", _resident(process)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if select.select([reading], [], [], 0.02)[0]:
            part = os.read(reading, 1 << 16)
            text += part
            if not part:  # the process has ended
                _, how = os.waitpid(process, 0)
                if text:
                    return Outcome(**json.loads(text))
                number = os.WTERMSIG(how) if os.WIFSIGNALED(how) else None
                if number == signal.SIGXCPU:
                    return Outcome("hang", f"more than {SECONDS_OF_CPU} s of CPU")
                return Outcome("crash", f"signal {number}" if number else f"exit {os.WEXITSTATUS(how)}")
        elif _resident(process) - least > BYTES:
            return Outcome("memory", f"more than {BYTES / 1e9:g} GB")
    return Outcome("hang", f"more than {SECONDS} s")


def _resident(process: int) -> int:
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _run(trial: Trial, writing: int) -> None:
    """Run the trial in the child, and end it."""
    outcome = Outcome("crash", "it ended the process")
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_OF_CPU, SECONDS_OF_CPU + 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        forbidden: list[str] = []
        sys.addaudithook(lambda event, arguments: _audit(event, arguments, trial.may_start, forbidden))
        try:
            wrong = trial.run()
            outcome = Outcome("accepted", wrong) if wrong else Outcome("right")
        except MemoryError as error:
            outcome = Outcome("memory", str(error)[:300])
        except BaseException as error:  # whatever it is, it is told
            outcome = _refusal(error, trial.name)
        if forbidden:
            outcome = Outcome("code", forbidden[0])
    finally:
        os.write(writing, json.dumps(outcome.__dict__).encode())
        os._exit(0)


def _audit(event: str, arguments: Any, may_start: tuple[str, ...], forbidden: list[str]) -> None:
    """Note programs that are started, and servers that are asked, unless they are on this machine."""
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        if not any(name in Path(str(arguments[0])).name for name in may_start):
            forbidden.append(f"{event} {arguments[0]}"[:200])
    elif event == "open" and arguments[0] == "/etc/passwd":
        forbidden.append("open /etc/passwd")
    elif event == "socket.connect" and str(arguments[1][0]) not in ("127.0.0.1", "localhost", "::1"):
        forbidden.append(f"{event} {arguments[1]}"[:200])


def _refusal(error: BaseException, name: str) -> Outcome:
    message = str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    seen = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {message[:300]}"
    # ImportError: what a file asks for is done by a package that is not installed.
    if not isinstance(error, ValueError | OSError | ChatError | ImportError):
        return Outcome("bare", seen)
    controls = any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in message)
    if name not in message or controls or len(message) > LONGEST:
        return Outcome("unclear", seen)
    return Outcome("right")
