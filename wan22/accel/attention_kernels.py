"""The attention kernels by name: PyTorch's one by one, and those of flash-attn and SageAttention.

Shapes: b batch, l query tokens, s key tokens, n heads, d head size.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..devices import capability as capability_of
from ..devices import is_rocm
from ..models.attention import native
from ..private_apis import (
    cudnn_attention,
    efficient_attention,
    flash_attention,
    flash_attention_for_cpu,
    math_attention,
    sdpa_choice,
)

HALF = (torch.float16, torch.bfloat16)
INSTALL_SAGE = "pip install --no-build-isolation sageattention==2.2.0"


class NotInstalledError(ImportError):
    """A kernel's library is not installed; any other error while loading it means that it is broken."""


@dataclass(frozen=True)
class Backend:
    """A kernel that can be chosen by name."""

    name: str
    # Imports the library and returns the function for `wan22.models.attention.Kernel`; or NotInstalledError.
    load: Callable[[], Callable[..., torch.Tensor]]
    # Returns, for a device, dtype and head size, why the kernel cannot run; or None.
    refuses: Callable[[torch.device, torch.dtype, int], str | None]
    exact: bool = True  # it computes in the dtype of its operands; others are chosen only by name
    # Whether "auto" tries it on a device, before PyTorch's own choice.
    preferred: Callable[[torch.device], bool] = lambda device: False


def running_kernel(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    queries: int = 4096,
    keys: int | None = None,
) -> str:
    """Return which of its kernels PyTorch chooses: "cudnn", "flash", "efficient" or "math"."""
    keys = keys or queries
    q, k = (torch.empty(1, 1, n, head_dim, dtype=dtype, device=device) for n in (queries, keys))
    choice = SDPBackend(sdpa_choice(q, k, k))
    return choice.name.removesuffix("_ATTENTION").lower()


# ---- where they run ----


def rules(
    device: str = "cuda",
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    multiple: int = 1,
    rocm: bool = False,
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """Return a kernel's `refuses` from its rules; None: any.

    `capability` is the GPU's lowest and highest compute capability, `multiple` a divisor of the head size,
    `rocm` whether it runs on AMD's GPUs, too.
    """

    def refuses(where: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if where.type != device:
            return f"it runs on {device} only"
        if device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU"
        if is_rocm(where) and not rocm:
            return "it runs on NVIDIA's GPUs only"
        found = capability_of(where)
        if capability is not None and found is not None:
            low, high = capability
            if not low <= found <= high:
                name, span = ".".join(map(str, found)), f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
                return f"it runs on compute capability {span}, and this GPU has {name}"
        if dtypes is not None and dtype not in dtypes:
            return f"it computes in {' and '.join(map(str, dtypes))} only"
        if head_dim % multiple:
            return f"its head size must be a multiple of {multiple}"
        return None

    return refuses


def _flash_refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type == "cpu":
        return None
    on_gpus = rules(capability=((8, 0), (99, 0)), dtypes=HALF, multiple=8, rocm=True)
    return on_gpus(device, dtype, head_dim)


def _is_hopper(device: torch.device) -> bool:
    return (capability_of(device) or (0, 0))[0] == 9


def _is_blackwell(device: torch.device) -> bool:
    return (capability_of(device) or (0, 0))[0] == 10


def _is_slower_by_choice(device: torch.device) -> bool:
    """Whether PyTorch prefers its FlashAttention 2 to cuDNN's kernel, as versions 2.6 to 2.9 do."""
    return (_is_hopper(device) or _is_blackwell(device)) and running_kernel(device) != "cudnn"


# ---- PyTorch's kernels ----


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)  # b l n d -> b n l d


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    if query.device.type == "cpu":
        return flash_attention_for_cpu(q, k, v)[0].transpose(1, 2)
    return flash_attention(q, k, v)[0].transpose(1, 2)


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    trained = query.requires_grad or key.requires_grad or value.requires_grad
    return cudnn_attention(q, k, v, None, trained)[0].transpose(1, 2)


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    trained = query.requires_grad or key.requires_grad or value.requires_grad
    return efficient_attention(q, k, v, None, trained)[0].transpose(1, 2)


def _math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    return math_attention(q, k, v)[0].transpose(1, 2)


# ---- kernels of other libraries ----


def _library(
    name: str, module: str, function: str, package: str, install: str | None = None, **options: Any
) -> Callable[..., Any]:
    """Return the `load` of a library's kernel, a function of "b l n d" tensors and the options."""

    def load() -> Callable[..., torch.Tensor]:
        return opaque(name, getattr(load_library(module, package, install), function), **options)

    return load


def load_library(module: str, package: str, install: str | None = None) -> Any:
    """Import a kernel's library; a NotInstalledError has the line that installs it, if that is one."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):  # itself, not one of its dependencies
            raise NotInstalledError(
                f"{package} is not installed" + (f": {install}" if install else "")
            ) from error
        raise


def opaque(name: str, function: Callable[..., Any], **options: Any) -> Callable[..., torch.Tensor]:
    """Make a kernel an operator of PyTorch, which torch.compile does not trace; without gradients.

    The function maps query, key and value "b l n d" and the options to the result, or to a tuple that begins
    with it.
    """

    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = function(query, key, value, **options)
        # Some versions return the logarithms of the sums, too. The layout is the one that `shape` returns.
        return (out[0] if isinstance(out, tuple) else out).contiguous()

    def shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query.new_empty(query.shape)

    operator = torch.library.custom_op(f"wan22::{name}", compute, mutates_args=())
    operator.register_fake(shape)
    return operator


# "auto" tries them in this order.
BACKENDS = (
    Backend("native", lambda: native, lambda device, dtype, head_dim: None),
    Backend("flash", lambda: _flash, _flash_refuses),
    Backend("efficient", lambda: _efficient, rules(multiple=8, rocm=True)),
    Backend("math", lambda: _math, lambda device, dtype, head_dim: None),
    Backend(
        "flash_attn_2",
        _library("flash_attn_2", "flash_attn.flash_attn_interface", "flash_attn_func", "flash-attn"),
        rules(capability=((8, 0), (99, 0)), dtypes=HALF, rocm=True),
    ),
    Backend(
        "flash_attn_3",
        _library("flash_attn_3", "flash_attn_interface", "flash_attn_func", "flash-attn-3"),
        rules(capability=((8, 0), (9, 9)), dtypes=HALF),
        preferred=_is_hopper,
    ),
    Backend(
        "flash_attn_4",
        _library("flash_attn_4", "flash_attn.cute", "flash_attn_func", "flash-attn-4"),
        rules(capability=((9, 0), (99, 0)), dtypes=HALF),
        preferred=_is_blackwell,
    ),
    Backend(
        "cudnn",
        lambda: _cudnn,
        rules(capability=((8, 0), (99, 0)), dtypes=HALF, multiple=8),
        preferred=_is_slower_by_choice,
    ),
    Backend(
        "sage",
        _library("sage", "sageattention", "sageattn", "sageattention", INSTALL_SAGE, tensor_layout="NHD"),
        rules(capability=((8, 0), (99, 0)), dtypes=HALF),
        exact=False,
    ),
)
