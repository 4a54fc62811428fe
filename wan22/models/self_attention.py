"""What computes self-attention in place of the dense kernel: chosen by layer and grid, before blocks run.

Shapes: b batch, l video tokens, n heads, d head size; t h w the grid of tokens.
"""

from typing import Protocol

import torch


class AttentionKernel(Protocol):
    """What blocks are passed as an argument, which compiled ones take: a tuple that can be called."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /) -> torch.Tensor:
        """Attend from "b l n d" to "b l n d": among all tokens, in all or some of the heads."""
        ...


class SelfAttention(Protocol):
    """Self-attention of the forwards that it is given to; what depends on the step is decided before them."""

    def kernel_of(
        self, layer: int, grid: tuple[int, int, int], device: torch.device
    ) -> AttentionKernel | None:
        """Return what computes a layer among a grid "t h w" of tokens; None: the layer's own kernel."""
        ...
