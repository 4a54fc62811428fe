"""Functions in the place of one object's methods: who may put them there, and who has."""

from collections.abc import Callable
from types import MethodType
from typing import Any


def is_own(owner: Any, name: str) -> bool:
    """Whether an object's method is its class's; what took it away may have left that on the object."""
    found = vars(owner).get(name)
    return found is None or getattr(found, "__func__", None) is getattr(type(owner), name)


def put(owner: Any, name: str, function: Callable[..., Any]) -> MethodType:
    """Let a function be an object's method, and return it as that."""
    # Past nn.Module's own attributes: this is no parameter, module or buffer.
    method = vars(owner)[name] = MethodType(function, owner)
    return method
