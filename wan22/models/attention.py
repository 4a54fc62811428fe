"""The one place where attention is computed; faster kernels register themselves here by name.

Shapes: b batch, l query tokens, s key tokens, n heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention.

    Args:
        function: maps query "b l n d", key and value "b s n d" to "b l n d".
        inner: name of the kernel that this one leaves the computing to, if it does.
    """

    function: Callable[..., torch.Tensor]
    inner: str | None = None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    backend: str = "native",
) -> torch.Tensor:
    """Softmax attention without causality or dropout.

    On the meta device the result is empty at once: no kernel would materialise the scores, and neither does
    whoever counts memory there.

    Args:
        query: "b l n d".
        key: "b s n d".
        value: "b s n d".
        backend: name of a registered kernel.

    Returns: "b l n d".

    Raises:
        ValueError: no kernel is registered under this name.
    """
    if query.is_meta:
        return query.new_empty((*query.shape[:3], value.shape[-1]))
    check_backend(backend)
    return _kernels[backend].function(query, key, value)


def native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, with the kernel that it chooses itself."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def register(name: str, kernel: Kernel) -> None:
    """Make a kernel known to `attention` under a name; checking it is up to the caller."""
    _kernels[name] = kernel


def unregister(name: str) -> None:
    """Forget the kernel of a name."""
    _kernels.pop(name, None)


def computing_backend(backend: str) -> str:
    """Return the name of the kernel that computes where this one is asked to."""
    kernel = _kernels.get(backend)
    return backend if kernel is None or kernel.inner is None else kernel.inner


def check_backend(backend: str) -> None:
    """Refuse names that no kernel is registered under.

    Raises:
        ValueError: there is no such kernel.
    """
    if backend not in _kernels:
        raise ValueError(
            f"attention backend {backend!r} is not registered, only {', '.join(map(repr, _kernels))}; "
            "wan22.accel.attention.use(model, name) checks a kernel and registers it"
        )


_kernels = {"native": Kernel(native)}
