"""Video tokens between embedding and head.

Shapes: b batch, l video tokens, s text or image tokens, k timesteps per sample, d model size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention_guidance import AttentionGuidance
from .layers import add_gated

Pending = tuple[torch.Tensor, torch.Tensor]


@dataclass
class TokenStream:
    """Video tokens on their way through the blocks, and what blocks and head are given beside them."""

    x: torch.Tensor  # "b l d"
    text: torch.Tensor  # "b s d"; with guidance the prompts' and then the negative ones', "2b s d"
    image: torch.Tensor | None  # "b s d"
    temb: torch.Tensor  # "b k d"
    modulation: torch.Tensor  # "b k 6 d"
    pending: Pending | None = None  # an update "b l d" that is still to be added to x, and its gate "b k d"
    guidance: AttentionGuidance | None = None

    def settle(self) -> None:
        """Add the update that is pending."""
        if self.pending is not None:
            self.x, self.pending = add_gated(self.x, *self.pending), None

    def residual(self, start: torch.Tensor) -> torch.Tensor:
        """Return what the blocks have added to the tokens "b l d" that they were given."""
        # With the blocks spread over devices, the stream ends on another one than it started on.
        return self.x - start.to(self.x.device)

    def skip_blocks(self, residual: torch.Tensor) -> None:
        """Add a residual "b l d", of any floating-point dtype, in place of what the blocks would add."""
        self.x = self.x + residual.to(self.x.device, self.x.dtype)


def split(batch: Sequence[torch.Tensor | None]) -> list[tuple[Any, ...]]:
    """Return the arguments of each sample of a batch by itself; what is None is None for each."""
    samples = next(len(e) for e in batch if e is not None)
    parts = ([None] * samples if e is None else e.chunk(samples) for e in batch)
    return list(zip(*parts, strict=True))


def joined(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the results of all samples as one batch; that of a single one is not copied."""
    return samples[0] if len(samples) == 1 else torch.cat(list(samples))
