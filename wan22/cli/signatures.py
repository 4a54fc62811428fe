"""The arguments of the pipelines' calls, read from their source.

The classes themselves would import torch, and `--help` and completion would take seconds.
"""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The pipelines, by the name of their file and of their command.
PIPELINES = {"t2v": "WanT2VPipeline", "i2v": "WanI2VPipeline"}
# Input channels of their transformers, see wan22.presets.
CHANNELS = {"t2v": (16, 48), "i2v": (36, 48)}


class Numbers(list[float]):
    """One number, or several with commas between."""


# Types that can be typed on a command line, and as what. An argument that takes none of them is for Python
# only: tensors, generators, callbacks, the form in which frames are returned.
TYPED = {
    **{"int": int, "float": float, "str": str, "Any": str, "Prompt": str, "Fit": str},
    **{"Sequence[float]": list, "dict[str, Any]": dict, "Scale": Numbers},
}


class CallArgument(NamedTuple):
    """An argument of a call that can be typed: as what, and its entry in the docstring."""

    type: type
    help: str


@cache
def call_arguments(task: str) -> Mapping[str, CallArgument]:
    """Return the arguments of a pipeline's call that can be typed on a command line."""
    call = _call(task)
    described: dict[str, str] = {}
    for other in (*PIPELINES, task):  # a docstring leaves out what another one has said
        described |= described_in(ast.get_docstring(_call(other)) or "")
    found = {}
    for argument in (*call.args.args[1:], *call.args.kwonlyargs):
        members = ast.unparse(argument.annotation).split(" | ") if argument.annotation else []
        if types := [TYPED[member] for member in members if member in TYPED]:
            found[argument.arg] = CallArgument(types[0], described[argument.arg])
    return found


def python_only() -> set[str]:
    """Return the arguments of the calls that cannot be typed: tensors, callbacks, the result's form."""
    calls = map(_call, PIPELINES)
    names = {a.arg for call in calls for a in (*call.args.args[1:], *call.args.kwonlyargs)}
    return names.difference(*map(call_arguments, PIPELINES))


def _call(task: str) -> ast.FunctionDef:
    file = Path(__file__).parents[1] / "pipelines" / f"{task}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    cls = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == PIPELINES[task])
    return next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__call__")


def described_in(docstring: str) -> dict[str, str]:
    """Return the entries of a docstring's "Args:", each as one line; it has no indentation of its own."""
    entries: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Args:\n")[2].partition("\n\n")[0].splitlines():
        if line.startswith(8 * " "):
            entries[name] += f" {line.strip()}"
        else:
            name, _, entries[name] = line.strip().partition(": ")
    return entries
