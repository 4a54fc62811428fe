"""Normalized attention guidance: cross-attention that keeps away from a negative text, in one pass.

Shapes: b batch, l video tokens, n heads, d head size.
"""

from typing import NamedTuple

import torch

from .fused import fused
from .layers import at_least_float32


class AttentionGuidance(NamedTuple):
    """How the results of attending to a prompt, z+, and to a negative one, z-, become one.

    z = scale z+ - (scale - 1) z-, whose L1 norm, over all heads of a token, is limited to tau times that of
    z+; the result is alpha z + (1 - alpha) z+.

    Source: arXiv 2505.21179, equations 6 to 9; ChenDarYen/Normalized-Attention-Guidance.
    """

    scale: float
    tau: float
    alpha: float

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Return what is attended to, given both, each "b l n d"; computed in float32 or wider."""
        return _guided(positive, negative, self.scale, self.tau, self.alpha)


@fused
def _guided(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, tau: float, alpha: float
) -> torch.Tensor:
    dtype = at_least_float32(positive.dtype)
    z, away = positive.to(dtype), negative.to(dtype)
    guided = scale * z - (scale - 1) * away
    most, norm = (x.abs().sum(dim=(-2, -1), keepdim=True) for x in (tau * z, guided))
    guided = guided * (most / norm.clamp(min=1e-12)).clamp(max=1)
    return (alpha * guided + (1 - alpha) * z).to(positive.dtype)
