"""Functions in place of a module's methods."""

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakSet

from torch import nn

_patched: WeakSet[MethodType] = WeakSet()


def is_own(module: nn.Module, name: str) -> bool:
    """Whether a module's method is its class's; who took another away may have left that on the module."""
    found = vars(module).get(name)
    return found is None or getattr(found, "__func__", None) is getattr(type(module), name)


def patch_method(module: nn.Module, name: str, function: Callable[..., Any]) -> MethodType:
    """Put a function in the place of a module's method, and return the new method."""
    # Past nn.Module's own attributes: this is no parameter, module or buffer.
    method = vars(module)[name] = MethodType(function, module)
    _patched.add(method)
    return method


def is_replaced(module: nn.Module, name: str) -> bool:
    """Whether something other than `patch_method` has replaced a module's method: an offload's hook, say."""
    return not is_own(module, name) and vars(module)[name] not in _patched
