"""What a person and a script read: results, progress and errors, and the exit codes."""

import codecs
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ..accel.parallel.environment import is_first, launched, rank
from ..checks import printable
from ..video.recipe import Recipe
from .options import Output
from .stopping import until_terminated
from .wording import in_flags

logger = logging.getLogger(__name__)

# Results go to stdout, everything else to stderr, so that a script reads nothing but results.
err = Console(stderr=True, highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)  # silent after --quiet
INTERRUPTED = 130
# How long ranks other than the first wait before they report an error. If the first rank has it, too, or
# caused it, its exit ends them within this time.
GRACE_SECONDS = 2.0
NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
_ASCII = {"…": "...", "×": "x", "–": "-", "−": "-", "’": "'", "“": '"', "”": '"'}


@dataclass(frozen=True)
class Result:
    """What a command made: written files, their recipe, and seconds by what they were spent on."""

    files: list[str]
    recipe: Recipe
    seconds: Mapping[str, float]

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C ended the run."""
        return self.recipe.steps_done is not None


def report(result: Result, output: Output) -> None:
    """Print a result on the first rank, and exit with 130 if Ctrl-C ended the run."""
    recipe = result.recipe
    if is_first() and output.as_json:
        print(json.dumps({**vars(result), "recipe": recipe.to_dict(), "stopped": result.stopped}))
    elif is_first():
        print_lines(*result.files)
        spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in result.seconds.items())
        say(f"seed {', '.join(map(str, recipe.seeds))}; {spent}")
    if result.stopped:
        warn(f"stopped after step {recipe.steps_done} of {recipe.num_inference_steps}")
        sys.stdout.flush()
        raise typer.Exit(INTERRUPTED)


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end an error with one line in its own words, exit code 1, or 130 after Ctrl-C."""
    flags: Mapping[str, str] = getattr(command, "flags", {})

    @wraps(command)
    def run(**values: Any) -> None:
        output = Output(**{name: values.get(name, False) for name in ("as_json", "quiet", "verbose")})
        with listening(output):
            try:
                with until_terminated():
                    command(**values)
            except KeyboardInterrupt:
                fail("interrupted", output.as_json, INTERRUPTED)
            except typer.Exit:  # a RuntimeError, too
                raise
            except (OSError, ValueError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
                logger.debug("where it was raised:", exc_info=error)
                fail(in_flags(line_of(error), flags), output.as_json, 1)

    return run


@contextmanager
def listening(output: Output) -> Iterator[None]:
    """Print log messages and notes as the options of a command say, and draw bars in terminals only."""
    root, own = logging.getLogger(), logging.getLogger(__name__.partition(".")[0])
    before = own.level
    handler = ToStderr(logging.NOTSET if output.verbose else logging.WARNING)
    root.addHandler(handler)
    if output.verbose:
        own.setLevel(logging.DEBUG)
    notes.quiet = output.quiet
    environment = os.environ.get(NO_BARS)
    if not output.draws_bars:
        os.environ[NO_BARS] = "1"  # which the hub's library and transformers read when they are imported
    try:
        yield
    finally:
        if environment is None:
            os.environ.pop(NO_BARS, None)
        notes.quiet = False
        root.removeHandler(handler)
        own.setLevel(before)


def accept_any_text() -> None:
    """Let stdout and stderr print what their encoding has no characters for, such as … in ASCII."""
    codecs.register_error("wan22", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="wan22")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    escaped = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(escaped), error.end


def line_of(error: BaseException) -> str:
    """Return an error as one line, with its type where the message was not written for a person."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{' '.join(error.strerror.split())}"
    plain = isinstance(error, ValueError | OSError) or kind in text
    return (text or kind) if plain or not text else f"{kind}: {text}"


def fail(message: str, as_json: bool, code: int) -> None:
    """Exit with an error; one of several ranks exits at once, whatever it waits for."""
    if not is_first():
        time.sleep(GRACE_SECONDS)
    if as_json and is_first():
        print(json.dumps({"error": message}))
    start = Text(f"error{'' if is_first() else f' of rank {rank()}'}:", "red")
    err.print(start, plain(message))
    if launched():
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


def say(message: str) -> None:
    """Print a note to stderr on the first rank, unless --quiet is given."""
    if is_first():
        notes.print(plain(message))


def warn(message: str) -> None:
    """Print to stderr on the first rank, after --quiet, too."""
    if is_first():
        err.print(plain(message))


def print_lines(*lines: Any) -> None:
    """Print results to stdout, a line each; what a terminal would obey, in a file's name, say, is escaped."""
    print(*(printable(str(line), keep="\n") for line in lines), sep="\n")


def plain(text: str) -> Text:
    """Return text for Rich, which finds no markup in it, and a terminal nothing to obey."""
    return Text(printable(text, keep="\n"))


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as lines, the columns below one another; nothing is folded or cut.

    A cell's further lines, in the last column, stand below its first.
    """
    cells = [[printable(cell, keep="\n") for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*(row[:-1] for row in cells), strict=True)]
    lines = []
    for *first, last in cells:
        padded = (cell + " " * (w - cell_len(cell) + 2) for cell, w in zip(first, widths, strict=True))
        start = "".join(padded)
        for line in last.split("\n"):
            lines.append((start + line).rstrip())
            start = " " * sum(width + 2 for width in widths)
    return "\n".join(lines)


class ToStderr(logging.Handler):
    """Prints log messages without what a terminal would obey: they name files and tensors of anybody's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message as one line or more, escaped."""
        err.print(plain(self.format(record)))
