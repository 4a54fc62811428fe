"""Sparse self-attention as a call is asked for it: names and settings.

Shapes: t h w the grid of tokens.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch

from ...checks import check_choice, check_positive_int, check_real, shown, unknown_argument
from ...models.self_attention import AttentionKernel
from ..attention_kernels import BACKENDS
from .blocks import FLEX_BLOCK, MOST_MASKS, BlockSparse, block_sparse
from .radial import radial_mask
from .sparge import LEAST_TOKENS, check_sparge, sparge_kernel

Grid = tuple[int, int, int]
# Tokens of the largest video are fewer; a block that holds all of them leaves out none.
MOST_BLOCK = 2**20


@dataclass(frozen=True)
class SparseAttention(ABC):
    """Settings of self-attention that leaves out pairs of tokens; it is wan22.models' `SelfAttention`.

    Layout is settled in the first steps, and the first layer looks everywhere: there attention stays dense,
    computed by the kernel that was chosen. The steps are counted over both experts together, as published:
    nothing is kept from step to step, so that an expert's first step is like any other.

    Args:
        dense_steps: share of the schedule's first steps, 0 to 1; 0.275 is 11 of 40.
        dense_layers: how many of the first layers.
    """

    dense_steps: float = field(default=0.275, kw_only=True)
    dense_layers: int = field(default=1, kw_only=True)

    method: ClassVar[str]

    def __post_init__(self) -> None:
        self._check(
            dense_steps=lambda name, value: check_real(name, value, 0, 1),
            dense_layers=lambda name, value: check_positive_int(name, value, least=0),
        )

    def _check(self, **rules: Any) -> None:
        """Check fields by a function of name and value each, and keep what it returns."""
        for name, rule in rules.items():
            object.__setattr__(self, name, rule(name, getattr(self, name)))

    def first_step(self, count: int) -> int:
        """Return the index of the first step, of so many, that is not dense."""
        return round(self.dense_steps * count)

    @abstractmethod
    def share(self, grid: Grid) -> float:
        """Return the share of blocks that a layer computes among a grid "t h w" of tokens, 0 to 1."""

    @abstractmethod
    def kernel(self, grid: Grid, device: torch.device) -> AttentionKernel | None:
        """Return what computes among a grid of tokens; None: nothing is left out."""

    def kernel_of(self, layer: int, grid: Grid, device: torch.device) -> AttentionKernel | None:
        """See SelfAttention."""
        return None if layer < self.dense_layers else self.kernel(grid, device)

    @abstractmethod
    def check_grid(self, grid: Grid) -> None:
        """Refuse, with a ValueError, a grid of tokens that it cannot work on."""

    @abstractmethod
    def check_device(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Refuse, with a ValueError, a device, dtype or head size that it cannot work on."""

    def plain(self) -> dict[str, Any]:
        """Return the settings as a recipe holds them; `sparse_attention_of` takes them again."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True)
class RadialAttention(SparseAttention):
    """Radial attention: tokens see one another the nearer they are in place, the further apart their frames.

    The mask is that of `wan22.accel.sparse.radial.radial_mask`. It depends on the grid alone, and is made
    once for it. On CUDA FlexAttention computes it.

    Args:
        decay: factor of the windows, 0 or more; less leaves out more.
        block: tokens of a block; on CUDA a multiple of 128.
        dense_steps, dense_layers: see SparseAttention.

    Source: arXiv 2506.19852; mit-han-lab/radial-attention, whose script for Wan 2.2 has these settings.
    """

    decay: float = 0.8
    block: int = FLEX_BLOCK

    method = "radial"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            decay=lambda name, value: check_real(name, value, 0, hint="such as 0.8"),
            block=lambda name, value: check_positive_int(name, value, most=MOST_BLOCK),
        )

    def share(self, grid: Grid) -> float:
        """See SparseAttention."""
        return radial_mask(grid, self.decay, self.block).double().mean().item()

    def kernel(self, grid: Grid, device: torch.device) -> AttentionKernel | None:
        """See SparseAttention."""
        return _radial_kernel(grid, self.decay, self.block, device)

    def check_grid(self, grid: Grid) -> None:
        """See SparseAttention; any grid will do."""

    def check_device(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """See SparseAttention."""
        if device.type == "cuda" and self.block % FLEX_BLOCK:
            nearest = max(FLEX_BLOCK, round(self.block / FLEX_BLOCK) * FLEX_BLOCK)
            raise ValueError(
                f"block={self.block} must be a multiple of {FLEX_BLOCK} on CUDA; the nearest is {nearest}"
            )


@lru_cache(maxsize=MOST_MASKS)
def _radial_kernel(grid: Grid, decay: float, block: int, device: torch.device) -> BlockSparse | None:
    kept = radial_mask(grid, decay, block)
    return None if kept.all() else block_sparse(kept.to(device), block)


@dataclass(frozen=True)
class SpargeAttention(SparseAttention):
    """SpargeAttn: blocks of keys are left out whose mean scores little with the mean of a block of queries.

    It computes by its package, on NVIDIA's GPUs, in 8 bits as SageAttention does.

    Args:
        keep: share of the blocks of keys that each block of queries attends to, above 0, at most 1.
        dense_steps, dense_layers: see SparseAttention.

    Source: arXiv 2502.18137; thu-ml/SpargeAttn spas_sage_attn/core.py, spas_sage2_attn_meansim_topk_cuda.
    """

    keep: float = 0.5

    method = "sparge"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(keep=lambda name, value: check_real(name, value, 0, 1, above=True, hint="such as 0.5"))

    def share(self, grid: Grid) -> float:
        """See SparseAttention; of blocks whose tokens differ much it keeps more."""
        return self.keep

    def kernel(self, grid: Grid, device: torch.device) -> AttentionKernel | None:
        """See SparseAttention."""
        return sparge_kernel(self.keep)

    def check_grid(self, grid: Grid) -> None:
        """See SparseAttention."""
        tokens = grid[0] * grid[1] * grid[2]
        if tokens < LEAST_TOKENS:
            raise ValueError(
                f"attention='sparge' needs videos of at least {LEAST_TOKENS} tokens, this one has {tokens}; "
                "leave attention out"
            )

    def check_device(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """See SparseAttention."""
        check_sparge(device, dtype, head_dim)


METHODS: Mapping[str, type[SparseAttention]] = {cls.method: cls for cls in (RadialAttention, SpargeAttention)}


def sparse_attention_of(value: Any) -> SparseAttention | None:
    """Return the sparse attention that a call is asked for.

    Args:
        value: "radial" or "sparge"; settings; a table with "method" and settings, as a recipe has them, also
            as JSON; or None.

    Raises: ValueError: there is no such method or setting, or a value breaks its rule.
    """
    if value is None or isinstance(value, SparseAttention):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _from_json(value)
    if isinstance(value, str):
        if value in (backend.name for backend in BACKENDS) or value == "auto":
            raise ValueError(
                f"attention={shown(value)} is a kernel, not a way to leave out; pipe.set_attention_backend("
                f"{shown(value)}) chooses it, --attention-backend on the command line"
            )
        check_choice("attention", value, METHODS)
        return METHODS[value]()
    if isinstance(value, Mapping):
        method = value.get("method")
        check_choice("attention's method", method, METHODS)
        cls, settings = METHODS[str(method)], {name: v for name, v in value.items() if name != "method"}
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(unknown_argument(f"attention {shown(method)}", str(unknown[0]), known))
        return cls(**settings)
    raise ValueError(
        f"attention={shown(value)} must be a name such as 'radial', or settings such as RadialAttention()"
    )


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        rule = 'a name, or JSON such as \'{"method": "radial", "decay": 0.5}\''
        raise ValueError(f"attention={shown(text)} must be {rule}: {error}") from None
