"""The arguments of the pipelines' calls, read from their source.

The classes themselves would import torch, and `--help` and completion would take seconds.
"""

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The pipelines, by the name of their file and of their command.
PIPELINES = {"t2v": "WanT2VPipeline", "i2v": "WanI2VPipeline"}


@dataclass(frozen=True)
class CallArgument:
    """An argument of a call that can be typed on a command line.

    Args:
        kind: int, float, str, or a function that parses a flag's text.
        help: its entry in the docstring, as one line.
    """

    kind: Callable[..., Any]
    help: str


def numbers(flag: str, text: str) -> list[float]:
    """Parse "1.0,0.5"; raise ValueError for something else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text} must be numbers with commas between: 1.0,0.5") from None


def json_object(flag: str, text: str) -> dict[str, Any]:
    """Parse '{"scale": 0.5}'; raise ValueError for something else."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{flag} {text} must be a JSON object, such as '{{\"scale\": 0.5}}'")
    return found


# How the types of arguments are typed on a command line. An argument that takes none of these is for Python
# only: tensors, generators, callbacks, the form in which frames are returned.
KINDS: dict[str, Callable[..., Any]] = {
    **{"int": int, "float": float, "str": str, "Any": str, "Prompt": str, "Fit": str},
    **{"Sequence[float]": numbers, "dict[str, Any]": json_object},
}


@cache
def call_arguments(task: str) -> Mapping[str, CallArgument]:
    """Return the arguments of a pipeline's call that can be typed on a command line.

    Args:
        task: key of PIPELINES.
    """
    call = _call(task)
    described: dict[str, str] = {}
    for other in (*PIPELINES, task):  # a docstring leaves out what another one has said
        described |= _described(ast.get_docstring(_call(other)) or "")
    found = {}
    for argument in (*call.args.args[1:], *call.args.kwonlyargs):
        kinds = [KINDS[member] for member in _members(argument.annotation) if member in KINDS]
        if kinds:
            found[argument.arg] = CallArgument(kinds[0], described[argument.arg])
    return found


def _call(task: str) -> ast.FunctionDef:
    file = Path(__file__).parents[1] / "pipelines" / f"{task}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    cls = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == PIPELINES[task])
    return next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__call__")


def _members(annotation: ast.expr | None) -> list[str]:
    """Return the members of a union as they are written."""
    if isinstance(annotation, ast.BinOp):
        return [*_members(annotation.left), *_members(annotation.right)]
    return [] if annotation is None else [ast.unparse(annotation)]


def _described(docstring: str) -> dict[str, str]:
    """Return the entries of a docstring's "Args:"."""
    entries: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Args:\n")[2].partition("\n\n")[0].splitlines():
        if line.startswith(8 * " "):
            entries[name] += f" {line.strip()}"
        else:
            name, _, entries[name] = line.strip().partition(": ")
    return entries
