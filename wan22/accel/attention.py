"""Attention kernels by name: PyTorch's one by one, and those of flash-attn and SageAttention if installed.

A kernel is checked against float32 attention before its first use on a device in a dtype; see `select`.

Shapes: b batch, l query tokens, s key tokens, n heads, d head size.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch.nn.attention import SDPBackend

from ..models.attention import Kernel, mask_of, native, register

logger = logging.getLogger(__name__)
aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)

# How far an exact kernel may be from float32 attention, relative in the L2 norm. Rounding to the dtype alone
# gives 1e-6, 4e-4 and 3e-3; a wrong scale, layout or padding gives 0.1 and more.
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The same for kernels that round their operands to 8 bits. SageAttention reports a few percent.
LOSSY_BOUND = 0.1

# Query and key tokens of the self-test: self-attention, and cross-attention with no round number.
LENGTHS = ((128, 128), (131, 77))


class NotInstalledError(ImportError):
    """A kernel's library is not there; any other error while loading it says that it is broken."""


@dataclass(frozen=True)
class Backend:
    """A kernel that can be chosen by name.

    Args:
        name: of the kernel.
        load: imports what it needs and returns the function for `wan22.models.attention.Kernel`; raises
            NotInstalledError where its library is not there.
        refuses: says of a device, dtype and head size why it cannot run there; None if it can.
        takes_bias: whether the function takes a bias.
        exact: whether it computes in the dtype of its operands; others are taken only by name.
        preferred: whether "auto" tries it on a device, before PyTorch's own choice.
    """

    name: str
    load: Callable[[], Callable[..., torch.Tensor]]
    refuses: Callable[[torch.device, torch.dtype, int], str | None]
    takes_bias: bool = False
    exact: bool = True
    preferred: Callable[[torch.device], bool] = lambda device: False


def add(backend: Backend) -> None:
    """Let a kernel be chosen by its name; one of that name is replaced."""
    _backends[backend.name] = backend


def available(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> dict[str, str | None]:
    """Return for each kernel why it cannot run, or None if it can. Nothing is run; `select` does that.

    Args:
        device: to run on; None: the GPU if there is one.
        dtype: of queries, keys and values.
        head_dim: channels of one head.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: _unfit(backend, device, dtype, head_dim) for name, backend in _backends.items()}


def select(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> str:
    """Choose a kernel, check it against float32 attention once, and register it.

    Args:
        name: of a kernel; "auto" takes the fastest exact one: FlashAttention 3 on compute capability 9.x and
            FlashAttention 4 on 10.x, if installed, else cuDNN's there; elsewhere PyTorch's own choice.
        device: to run on.
        dtype: of queries, keys and values.
        head_dim: channels of one head.

    Returns: the name for `attention` and `set_attention_backend`. Where "auto" finds that a kernel fails its
    check, or that its library is broken, it warns and goes on.

    Raises:
        ValueError: there is no kernel of that name, it cannot run here, or it fails its check.
    """
    device = torch.device(device)
    if name == "auto":
        return _fastest(device, dtype, head_dim)
    if name not in _backends:
        reason: str | None = "there is none of that name"
    else:
        reason = _problem(_backends[name], device, dtype, head_dim)
    if reason is None:
        return name
    usable = [n for n, why_not in available(device, dtype, head_dim).items() if why_not is None and n != name]
    raise ValueError(
        f"attention backend {name!r} cannot be used on {device} in {dtype} with {head_dim} channels a head: "
        f"{reason}; available: {', '.join(usable)}"
    )


def use(
    model: Any, name: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> str:
    """Let a transformer compute attention with a kernel.

    Args:
        model: a WanTransformer3DModel.
        name: of the kernel, or "auto", see `select`.
        device: that it will run on; None: the one that it runs on now, offloaded or not.
        dtype: that it will run in; None: the model's.

    Returns: the kernel's name.

    Raises:
        ValueError: the kernel cannot be used.
    """
    model = getattr(model, "_orig_mod", model)  # inside of what torch.compile returned
    device = torch.device(device or get_module_execution_device(model))
    dtype = dtype or model.dtype
    chosen = select(name, device, dtype, model.head_dim)
    model.set_attention_backend(chosen)
    logger.info("attention on %s: %s", device, describe(chosen, device, dtype, model.head_dim))
    return chosen


def running_kernel(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    queries: int = 4096,
    keys: int | None = None,
    bias: bool = False,
) -> str:
    """Return which of its kernels PyTorch chooses: "cudnn", "flash", "efficient" or "math".

    The question is put to the function that scaled_dot_product_attention itself asks.

    Args:
        device: to run on.
        dtype: of queries, keys and values.
        head_dim: channels of one head.
        queries: number of tokens.
        keys: number of tokens; None: as many.
        bias: whether the keys have one.
    """
    keys = keys or queries
    q, k = (torch.empty(1, 1, n, head_dim, dtype=dtype, device=device) for n in (queries, keys))
    mask = torch.empty(1, 1, 1, keys, dtype=dtype, device=device) if bias else None
    choice = SDPBackend(torch._fused_sdp_choice(q, k, k, mask))
    return choice.name.removesuffix("_ATTENTION").lower()


def describe(
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    queries: int = 4096,
) -> str:
    """Say which kernel runs under a name; the arguments are those of `running_kernel`."""
    if backend != "native":
        return backend
    return f"native, PyTorch {torch.__version__}'s {running_kernel(device, dtype, head_dim, queries)} kernel"


# ---- checks ----


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the first of the preferred kernels that is installed and right, or "native"."""
    for name, backend in _backends.items():
        if not backend.exact or not backend.preferred(device):
            continue
        if backend.refuses(device, dtype, head_dim) is not None or not _is_installed(backend):
            continue
        reason = _problem(backend, device, dtype, head_dim)
        if reason is None:
            return name
        logger.warning(
            "attention backend %r is left out on %s in %s: %s; PyTorch's own is used instead",
            name,
            device,
            dtype,
            reason,
        )
    return "native"


def _unfit(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why a kernel cannot run, without running it; importing it is part of that."""
    reason = backend.refuses(device, dtype, head_dim)
    if reason is not None:
        return reason
    try:
        _function(backend)
    except Exception as error:  # libraries built for another PyTorch fail in many ways
        return f"{type(error).__name__}: {error}"
    return None


def _is_installed(backend: Backend) -> bool:
    """Whether a kernel's library is there, broken or not."""
    try:
        _function(backend)
    except NotInstalledError:
        return False
    except Exception:  # which `_unfit` tells
        return True
    return True


def _problem(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why a kernel cannot be used, or register it."""
    reason = _unfit(backend, device, dtype, head_dim)
    if reason is None and backend.name != "native":  # which is what the others are measured by
        try:
            reason = _failure(backend, device, dtype, head_dim)
        except torch.OutOfMemoryError as error:  # which is not the kernel's fault; the next call tries again
            reason = f"there is no memory to check it: {error}"
    if reason is None:
        register(backend.name, Kernel(_function(backend), backend.takes_bias))
    return reason


@cache
def _function(backend: Backend) -> Callable[..., torch.Tensor]:
    return backend.load()


@cache
@torch.no_grad()
def _failure(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run a kernel on small random tensors, and say how it fails; None if it does not.

    Raises:
        torch.OutOfMemoryError: it cannot be told now.
    """
    bound = BOUNDS.get(dtype, 0.0) if backend.exact else LOSSY_BOUND
    function, generator = _function(backend), torch.Generator().manual_seed(0)
    for l, s in LENGTHS:  # noqa: E741
        shapes = [(2, n, 3, head_dim) for n in (l, s, s)]
        given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        given += [torch.randn(2, s, generator=generator).to(dtype)] if backend.takes_bias else []
        # On the CPU, where float32 means float32, whatever is set for the GPU.
        expected = native(*(x.float() for x in given))
        try:
            found = function(*(x.to(device) for x in given)).cpu().float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"it raises {type(error).__name__}: {error}"
        if found.shape != expected.shape:
            return f"it returns shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        deviation = ((found - expected).norm() / expected.norm()).item()
        if not deviation <= bound:  # NaN is not
            return (
                f"it deviates by {deviation:.1e} from float32 attention with {l} queries and {s} keys, and "
                f"{bound:g} is allowed"
            )
    return None


def _rules(
    device: str = "cuda",
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    multiple: int = 1,
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """Return what a kernel refuses.

    Args:
        device: type that it needs.
        capability: the lowest and the highest of the GPU.
        dtypes: that it can compute in; None: any.
        multiple: that the head size must be one of.
    """

    def refuses(where: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if where.type != device:
            return f"it runs on {device} only"
        if device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU"
        if capability is not None:
            low, high = capability
            found = torch.cuda.get_device_capability(where)
            if not low <= found <= high:
                name, span = ".".join(map(str, found)), f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
                return f"it runs on compute capability {span}, and this GPU has {name}"
        if dtypes is not None and dtype not in dtypes:
            return f"it computes in {' and '.join(map(str, dtypes))} only"
        if head_dim % multiple:
            return f"its head size must be a multiple of {multiple}"
        return None

    return refuses


# ---- PyTorch's kernels ----
# Each is called by itself: torch.nn.attention.sdpa_kernel sets flags of the whole process, and where two
# threads enter and leave it in turns, the restriction of one stays behind.


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)  # b l n d -> b n l d


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].transpose(1, 2)
    return aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2)


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    trained = query.requires_grad or key.requires_grad or value.requires_grad
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, trained)[0].transpose(1, 2)


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    trained = query.requires_grad or key.requires_grad or value.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, trained)[0].transpose(1, 2)


def _math(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    q, k, v = _heads_first(query, key, value)
    mask = None if bias is None else mask_of(bias, query.dtype)
    return aten._scaled_dot_product_attention_math(q, k, v, mask)[0].transpose(1, 2)


def _flash_refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type == "cpu":
        return None
    return _rules(capability=((8, 0), (99, 0)), dtypes=HALF, multiple=8)(device, dtype, head_dim)


# ---- kernels of other libraries ----


def _library(name: str, module: str, function: str, package: str, **options: Any) -> Callable[..., Any]:
    """Return what loads a kernel of a library that has "b l n d" tensors, too.

    Args:
        name: of the backend.
        module: that holds the function.
        function: its name.
        package: to install, for the error.
        **options: more arguments.
    """

    def load() -> Callable[..., torch.Tensor]:
        try:
            library = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if f"{module}.".startswith(f"{error.name}."):  # and not something that it needs
                raise NotInstalledError(f"{package} is not installed") from error
            raise
        return opaque(name, getattr(library, function), **options)

    return load


def opaque(name: str, function: Callable[..., Any], **options: Any) -> Callable[..., torch.Tensor]:
    """Hide a kernel behind an operator of PyTorch, which torch.compile does not look into.

    Gradients are not defined for it: these kernels are for inference.

    Args:
        name: of the operator, in wan22's namespace.
        function: of query, key and value, "b l n d"; returns the result or a tuple that begins with it.
        **options: more arguments.
    """

    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = function(query, key, value, **options)
        # Some versions return the logarithm of the sums, too. The layout is what `shape` promises.
        return (out[0] if isinstance(out, tuple) else out).contiguous()

    def shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query.new_empty(query.shape)

    operator = torch.library.custom_op(f"wan22::{name}", compute, mutates_args=())
    operator.register_fake(shape)
    return operator


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _is_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def _is_slower_by_choice(device: torch.device) -> bool:
    """Whether PyTorch has cuDNN's kernel run after its FlashAttention 2, as versions 2.6 to 2.9 do."""
    return (_is_hopper(device) or _is_blackwell(device)) and running_kernel(device) != "cudnn"


# Those that "auto" prefers, in the order in which it tries them.
_backends: dict[str, Backend] = {}
for _backend in (
    Backend("native", lambda: native, lambda device, dtype, head_dim: None, takes_bias=True),
    Backend("flash", lambda: _flash, _flash_refuses),
    Backend("efficient", lambda: _efficient, _rules(multiple=8)),
    Backend("math", lambda: _math, lambda device, dtype, head_dim: None, takes_bias=True),
    Backend(
        "flash_attn_2",
        _library("flash_attn_2", "flash_attn.flash_attn_interface", "flash_attn_func", "flash-attn"),
        _rules(capability=((8, 0), (99, 0)), dtypes=HALF),
    ),
    Backend(
        "flash_attn_3",
        _library("flash_attn_3", "flash_attn_interface", "flash_attn_func", "flash-attn-3"),
        _rules(capability=((8, 0), (9, 9)), dtypes=HALF),
        preferred=_is_hopper,
    ),
    Backend(
        "flash_attn_4",
        _library("flash_attn_4", "flash_attn.cute", "flash_attn_func", "flash-attn-4"),
        _rules(capability=((9, 0), (99, 0)), dtypes=HALF),
        preferred=_is_blackwell,
    ),
    Backend(
        "cudnn",
        lambda: _cudnn,
        _rules(capability=((8, 0), (99, 0)), dtypes=HALF, multiple=8),
        preferred=_is_slower_by_choice,
    ),
    Backend(
        "sage",
        _library("sage", "sageattention", "sageattn", "sageattention", tensor_layout="NHD"),
        _rules(capability=((8, 0), (99, 0)), dtypes=HALF),
        exact=False,
    ),
):
    add(_backend)
