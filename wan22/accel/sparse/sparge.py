"""SpargeAttn's kernel, from its package: which blocks are left out follows from the tokens themselves.

Shapes: b batch, l tokens, n heads, d head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from ..attention import failure
from ..attention_kernels import HALF, Backend, NotInstalledError, load_library, rules

INSTALL = "pip install --no-build-isolation git+https://github.com/thu-ml/SpargeAttn.git"
LEAST_TOKENS = 128
_MODULE, _FUNCTION = "spas_sage_attn", "spas_sage2_attn_meansim_topk_cuda"


class SpargeKernel(NamedTuple):
    """An attention kernel, see `sparge_kernel`."""

    keep: float

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /) -> torch.Tensor:
        """Attend from "b l n d" to some of "b l n d"."""
        attended: torch.Tensor = torch.ops.wan22.sparge_attention(query, key, value, self.keep)
        return attended


def sparge_kernel(keep: float) -> SpargeKernel:
    """Return SpargeAttn's kernel, with the share of the blocks of keys that each block attends to."""
    _define_operator()
    return SpargeKernel(keep)


@cache
def _define_operator() -> None:
    """Make it an operator, which torch.compile does not trace."""
    operator = torch.library.custom_op("wan22::sparge_attention", _attend, mutates_args=())
    operator.register_fake(lambda query, key, value, keep: query.new_empty(query.shape))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: float) -> torch.Tensor:
    return _function()(query, key, value, topk=keep, tensor_layout="NHD").contiguous()


def check_sparge(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Refuse SpargeAttn, with a ValueError, where it cannot run or is not installed.

    Keeping all blocks, it is once compared with float32 attention, as 8-bit kernels are.
    """
    refused = _refuses(device, dtype, head_dim)
    try:
        _function()
    except NotInstalledError as error:
        refused = refused or str(error)
    except Exception as error:  # libraries built for another PyTorch fail in many ways
        refused = refused or f"{type(error).__name__}: {error}"
    lengths = ((2 * LEAST_TOKENS, 2 * LEAST_TOKENS), (300, 300))
    refused = refused or failure(_KEEPING_ALL, device, dtype, head_dim, lengths)
    if refused is not None:
        where = f"on {device} in {dtype} with {head_dim} channels a head"
        raise ValueError(f"attention='sparge' cannot be used {where}: {refused}")


def _keeping_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return sparge_kernel(1.0)(query, key, value)


@cache
def _function() -> Callable[..., Any]:
    return getattr(load_library(_MODULE, "SpargeAttn", INSTALL), _FUNCTION)


_on_gpus = rules(capability=((8, 0), (99, 0)), dtypes=HALF)


def _refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    sizes = None if head_dim in (64, 128) else "its head size must be 64 or 128"
    return _on_gpus(device, dtype, head_dim) or sizes


_KEEPING_ALL = Backend("sparge", lambda: _keeping_all, _refuses, exact=False)
