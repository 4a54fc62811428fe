"""Attention kernels by name, or the fastest exact one.

A kernel is checked against float32 attention before its first use on a device in a dtype; see `select`.

Shapes: b batch, l query tokens, s key tokens, n heads, d head size.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device

from ..checkpoints.loading.attention_names import our_name, their_name
from ..checks import shown
from ..devices import card
from ..models.attention import Kernel, finders, native, register
from ..models.transformer import WanTransformer3DModel
from ..private_apis import keeping_active_attention_backend, uncompiled
from .attention_kernels import BACKENDS, Backend, NotInstalledError, running_kernel

logger = logging.getLogger(__name__)

# How far an exact kernel may be from float32 attention, relative in the L2 norm. Rounding to the dtype alone
# gives 1e-6, 4e-4 and 3e-3; a wrong scale, layout or padding gives 0.1 and more.
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The same for kernels that round their operands to 8 bits. SageAttention reports a few percent.
LOSSY_BOUND = 0.1

# Query and key tokens of the self-test: self-attention, and cross-attention with no round number.
LENGTHS = ((128, 128), (131, 77))

_backends = {backend.name: backend for backend in BACKENDS}


def add(backend: Backend) -> None:
    """Let a kernel be chosen by its name; one of that name is replaced."""
    _backends[backend.name] = backend


def available(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> dict[str, str | None]:
    """Return for each kernel why it cannot run, or None if it can. Nothing is run; `select` does that.

    Args:
        device: device to run on; None: the GPU if there is one.
        dtype: dtype of queries, keys and values.
        head_dim: channels of one head.
    """
    device = torch.device(device or card() or "cpu")
    return {name: _unfit(backend, device, dtype, head_dim) for name, backend in _backends.items()}


def select(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> str:
    """Choose a kernel, check it against float32 attention once, and register it.

    "auto" is the fastest exact one: FlashAttention 3 on compute capability 9.x and FlashAttention 4 on 10.x,
    if installed, else cuDNN's there; elsewhere PyTorch's own choice. It warns of kernels that fail their
    check or whose library is broken, and leaves them out. The other arguments are those of `available`.

    Returns: the name for `attention` and `set_attention_backend`.
    Raises: ValueError: there is no kernel of that name, it cannot run here, or it fails its check.
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
        f"attention backend {shown(name)} cannot be used on {device} in {dtype} with {head_dim} channels "
        f"a head: {reason}; available: {', '.join(usable)}"
    )


def use(
    model: Any,
    name: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Let a transformer compute attention with a kernel, and return the kernel's name.

    Args:
        model: the transformer, wan22's or diffusers', compiled or not.
        name: the kernel's name, or "auto", see `select`; or diffusers' name of it.
        device: device that the model will run on; None: where it runs now, offloaded or not.
        dtype: dtype that the model will run in; None: its own.

    Raises: ValueError: the kernel cannot be used.
    """
    model = uncompiled(model)
    device = torch.device(device or get_module_execution_device(model))
    dtype = dtype or model.dtype
    ours = isinstance(model, WanTransformer3DModel)
    head_dim = model.head_dim if ours else model.config.attention_head_dim
    chosen = select(our_name(name), device, dtype, head_dim)
    with keeping_active_attention_backend():
        model.set_attention_backend(chosen if ours else their_name(chosen))
    logger.info("attention on %s: %s", device, describe(chosen, device, dtype, head_dim))
    return chosen


def describe(
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    queries: int = 4096,
) -> str:
    """Return the name of the kernel that runs under a name; the arguments are those of `running_kernel`."""
    if backend != "native":
        return backend
    return f"native, PyTorch {torch.__version__}'s {running_kernel(device, dtype, head_dim, queries)} kernel"


def _find(name: str, model: Any) -> str:
    """Check a kernel for a transformer, where it runs now or will run: on the GPU, if there is one."""
    device = get_module_execution_device(model)
    if device.type == "cpu" and (gpu := card()) is not None and name in _backends:
        on_cpu = _unfit(_backends[name], device, model.dtype, model.head_dim) is None
        device = device if on_cpu else gpu
    return select(name, device, model.dtype, model.head_dim)


finders.append(_find)


# ---- checks ----


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the first preferred kernel that is installed and passes its check, or "native"."""
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
    """Return why a kernel cannot run, or None; it is imported, but not run."""
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
    except Exception:  # `_unfit` says so
        return True
    return True


def _problem(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a kernel cannot be used, or register it."""
    reason = _unfit(backend, device, dtype, head_dim)
    if reason is None and backend.name != "native":  # what the others are compared with
        try:
            reason = failure(backend, device, dtype, head_dim)
        except torch.OutOfMemoryError as error:  # not the kernel's fault; the next call tries again
            reason = f"there is no memory to check it: {error}"
    if reason is None:
        register(backend.name, Kernel(_function(backend)))
    return reason


@cache
def _function(backend: Backend) -> Callable[..., torch.Tensor]:
    return backend.load()


@cache
@torch.no_grad()
def failure(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    lengths: tuple[tuple[int, int], ...] = LENGTHS,
) -> str | None:
    """Run a kernel on small random tensors, once; return how it fails, or None.

    `lengths` are numbers of queries and keys; the other arguments are those of `available`.
    """
    bound = BOUNDS.get(dtype, 0.0) if backend.exact else LOSSY_BOUND
    function, generator = _function(backend), torch.Generator().manual_seed(0)
    for l, s in lengths:  # noqa: E741
        shapes = [(2, n, 3, head_dim) for n in (l, s, s)]
        given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
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
