"""Adapter names that PEFT cannot keep, which are attributes of its dictionaries or hold a dot, and back."""

import re
from functools import cache
from urllib.parse import unquote

from torch import nn


def to_peft(name: str) -> str:
    """Return the name under which PEFT keeps an adapter; one that it can keep stays as it is."""
    if not name:
        raise ValueError("an adapter's name must not be empty; give a name, or None for the next free one")
    if name in _attributes():  # such as "train"
        return f"%{ord(name[0]):02X}{name[1:]}"
    return re.sub(r"\.|%(?![0-9A-F]{2})", lambda match: f"%{ord(match[0]):02X}", name)


def from_peft(name: str) -> str:
    """Return an adapter's name from the one under which PEFT keeps it."""
    return unquote(name)


@cache
def _attributes() -> frozenset[str]:
    return frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))
