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
        function: of query "b l n d", key and value "b s n d", and bias "b s" if there is one and it takes
            one; returns "b l n d".
        takes_bias: whether it takes one; kernels without masks, the fastest ones, do not.
        inner: of a kernel that leaves the computing to another one, that one's name.
    """

    function: Callable[..., torch.Tensor]
    takes_bias: bool = False
    inner: str | None = None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str = "native",
) -> torch.Tensor:
    """Softmax attention without causality or dropout.

    On the meta device the result is empty at once: no kernel would materialise the scores, and neither does
    whoever counts memory there.

    Args:
        query: "b l n d".
        key: "b s n d".
        value: "b s n d".
        bias: "b s", added to the logits of each key for every query and head; log(c) makes one key count as
            c. A kernel that takes none leaves such a call to the native one.
        backend: name of a registered kernel.

    Returns: "b l n d".

    Raises:
        ValueError: no kernel is registered under this name.
    """
    if query.is_meta:
        return query.new_empty((*query.shape[:3], value.shape[-1]))
    check_backend(backend)
    kernel = _kernels[backend]
    if bias is None:
        return kernel.function(query, key, value)
    return (kernel.function if kernel.takes_bias else native)(query, key, value, bias)


def native(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, with the kernel that it chooses itself."""
    mask = None if bias is None else mask_of(bias, query.dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def mask_of(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Shape a bias "b s" to be added to logits "b n l s"."""
    return bias[:, None, None, :].to(dtype)


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


_kernels = {"native": Kernel(native, takes_bias=True)}
