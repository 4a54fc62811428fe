"""What a person and a script read: results, progress and errors, and the exit codes."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ..accel.parallel.environment import is_first, launched, rank
from ..checks import printable
from ..video.recipe import Recipe

# Results go to stdout, everything else to stderr, so that a script reads nothing but results.
err = Console(stderr=True, highlight=False, soft_wrap=True)
INTERRUPTED = 130
# How long ranks other than the first wait before they report an error. If the first rank has it, too, or
# caused it, its exit ends them within this time.
GRACE_SECONDS = 2.0


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


def report(result: Result, as_json: bool) -> None:
    """Print a result on the first rank, and exit with 130 if Ctrl-C ended the run."""
    recipe = result.recipe
    if is_first() and as_json:
        print(json.dumps({**vars(result), "recipe": recipe.to_dict(), "stopped": result.stopped}))
    elif is_first():
        print_lines(*result.files)
        spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in result.seconds.items())
        say(f"seed {', '.join(map(str, recipe.seeds))}; {spent}")
    if result.stopped:
        say(f"stopped after step {recipe.steps_done} of {recipe.num_inference_steps}")
        sys.stdout.flush()
        raise typer.Exit(INTERRUPTED)


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end an error with one line and exit code 1, or 130 after Ctrl-C."""

    @wraps(command)
    def run(**values: Any) -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING)
        try:
            command(**values)
        except KeyboardInterrupt:
            fail("interrupted", values.get("as_json", False), INTERRUPTED)
        except typer.Exit:  # a RuntimeError, too
            raise
        except (OSError, ValueError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
            fail(line_of(error), values.get("as_json", False), 1)

    return run


def line_of(error: BaseException) -> str:
    """Return an error as one line, with its type where the message was not written for a person."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    plain = isinstance(error, ValueError | FileNotFoundError | FileExistsError) or kind in text
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


def say(message: str, quiet: bool = False) -> None:
    """Print to stderr on the first rank."""
    if not quiet and is_first():
        err.print(plain(message))


def print_lines(*lines: Any) -> None:
    """Print results to stdout, a line each; what a terminal would obey, in a file's name, say, is escaped."""
    print(*(printable(str(line), keep="\n") for line in lines), sep="\n")


def plain(text: str) -> Text:
    """Return text for Rich, which finds no markup in it, and a terminal nothing to obey."""
    return Text(printable(text, keep="\n"))


class PlainFormatter(logging.Formatter):
    """Log messages without what a terminal would obey: they name files and tensors of anybody's."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message as one line or more, escaped."""
        return printable(super().format(record), keep="\n")
