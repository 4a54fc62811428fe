"""The one function that computes attention; faster kernels are registered here by name.

Shapes: b batch, l query tokens, s key tokens, n heads, d head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..checks import shown
from .self_attention import AttentionKernel


@dataclass(frozen=True)
class Kernel:
    """An attention kernel."""

    function: Callable[..., torch.Tensor]  # query "b l n d", key and value "b s n d" to "b l n d"
    # The kernel that this one calls; what is to compute in its place comes as a fourth argument.
    inner: str | None = None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    backend: str = "native",
    instead: AttentionKernel | None = None,
) -> torch.Tensor:
    """Softmax attention without dropout: query "b l n d", key and value "b s n d" to "b l n d".

    All queries attend to all keys, unless `instead` computes in the place of the backend's kernel.
    On the meta device no kernel runs: none materialises the scores, and PyTorch's meta kernel would.
    """
    if query.is_meta:
        return OnMeta.apply(query, key, value)
    backend = _preferred if backend == "native" else backend
    check_backend(backend)
    kernel = _kernels[backend]
    if instead is None:
        return kernel.function(query, key, value)
    return instead(query, key, value) if kernel.inner is None else kernel.function(query, key, value, instead)


class OnMeta(torch.autograd.Function):
    """What attention keeps for its gradients: queries, keys, values and its result."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return an empty result."""
        out = query.new_empty((*query.shape[:3], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return empty gradients."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, with the kernel that PyTorch chooses."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@contextmanager
def preferring(backend: str) -> Iterator[None]:
    """Let a kernel compute, within the context, what no other was chosen for than "native"."""
    global _preferred
    check_backend(backend)
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


def find(name: str, model: Any) -> str:
    """Return the name of the registered kernel for a name; a finder may check and register it for a model."""
    for finder in () if name in _kernels else finders:
        name = finder(name, model)
    check_backend(name)
    return name


def register(name: str, kernel: Kernel) -> None:
    """Let `attention` use a kernel under a name, without checking it."""
    _kernels[name] = kernel


def unregister(name: str) -> None:
    """Remove the kernel of a name."""
    _kernels.pop(name, None)


def computing_backend(backend: str) -> str:
    """Return the name of the kernel that a backend calls in the end."""
    kernel = _kernels.get(backend)
    return backend if kernel is None or kernel.inner is None else kernel.inner


def check_backend(backend: str) -> None:
    """Refuse a name under which no kernel is registered."""
    if backend not in _kernels:
        raise ValueError(
            f"attention backend {shown(backend)} is not registered, only {', '.join(map(repr, _kernels))}; "
            "wan22.accel.attention.use(model, name) checks a kernel and registers it"
        )


_kernels = {"native": Kernel(native)}
_preferred = "native"
# Functions for `find`; `wan22.accel.attention` has one, which knows the kernels of libraries.
finders: list[Callable[[str, Any], str]] = []
