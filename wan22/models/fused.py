"""Plain functions of tensors that are one kernel each on a GPU, compiled by torch.compile when first called.

What lies between two matrix products only reads and writes activations: as one kernel it reads and writes
each once, where PyTorch's operators do so two to five times. Compiling a function takes seconds, not the
minutes of a whole model, serves all layers and sizes of video, and is cached on disk.

Everywhere else the functions run as they are written: on the CPU, where Triton is missing (Windows), inside
torch.compile, which fuses them itself, and for gradients.
"""

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from ..private_apis import allow_recompiling, mark_static, maybe_mark_dynamic

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run as one kernel where the tensors are on a GPU.

    It takes tensors, numbers and dtypes by position, the first a tensor, and writes to none of them that it
    reads. Axis 1 of tensors with three axes or more is variable: tokens, positions. Other sizes are compiled
    for.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs or not applies(*args):
            return function(*args, **kwargs)
        return _as_kernel(function, args)

    return run


def set_fused(enabled: bool = True) -> None:
    """Let all models of the process compute by fused kernels on GPUs, which is the default, or by none."""
    global _enabled
    _enabled = enabled


def is_fused() -> bool:
    """Whether models compute by fused kernels where they can."""
    return _enabled


def applies(*args: Any) -> bool:
    """Whether a call with these arguments is computed by fused kernels."""
    if torch.compiler.is_compiling() or not _enabled or not args[0].is_cuda or not has_compiler():
        return False
    given = [value for value in args if isinstance(value, torch.Tensor)]
    # Subclasses are tensors that are traced or hold something else.
    return all(type(value) in (torch.Tensor, nn.Parameter) for value in given) and not (
        torch.is_grad_enabled() and any(value.requires_grad for value in given)
    )


def _as_kernel(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if function in _failed:
        return function(*args)
    try:
        return compiled(function)(*map(_marked, args))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # A compiler that does not work here, for want of a C compiler say, costs speed only. If what failed
        # is something else, the plain function fails as well, and says so.
        result = function(*args)
        _failed.add(function)
        reason = str(error).strip().partition("\n")[0]
        logger.warning("%s runs unfused: torch.compile fails here: %s", function.__name__, reason)
        return result


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as torch.compile makes it."""
    allow_recompiling()
    return torch.compile(function)


def _marked(value: Any) -> Any:
    """Return an argument with its variable axis known to the compiler; the caller's tensor is not marked."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    mark_static(value)
    if value.ndim >= 3:
        maybe_mark_dynamic(value, 1)
    return value


@cache
def has_compiler() -> bool:
    """Whether Triton is there, which compiles for GPUs."""
    return find_spec("triton") is not None


_enabled = True
_failed: set[Callable[..., Any]] = set()
