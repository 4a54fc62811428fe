"""Formulas of two predictions, c with the prompt and u with the negative one, and a scale g.

Shapes: c latent channels, t h w latent frames, rows, columns. Sums run over all of a video unless said.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ....checks import check_positive_int, check_real
from ..experts import Step
from .guider import Guider, Memory, PassSettings, first_step

# A video's axes "1 c t h w" but the frames'.
_OF_A_FRAME = (1, 3, 4)
_TINY = 1e-12


@dataclass(frozen=True)
class CFGZeroStar(Guider):
    """CFG-Zero*: v = s u + g (c - s u) with s = <c, u> / |u|^2; the first steps have v = 0.

    At those steps the noise is clearer than the prediction, and the transformer does not run.

    Args:
        zero_steps: how many; None: 4 % of the steps.

    Source: arXiv 2503.18886, algorithm 1; WeichenFan/CFG-Zero-star.
    """

    name = "cfg-zero*"

    zero_steps: int | None = None

    def __post_init__(self) -> None:
        if self.zero_steps is not None:
            check_positive_int("zero_steps", self.zero_steps, least=0)

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return none at the first steps."""
        zero_steps = first_step(0.04, step.count) if self.zero_steps is None else self.zero_steps
        return {} if scale != 1 and step.index < zero_steps else super().passes(step, scale, since)

    def guided(self, c: torch.Tensor, u: torch.Tensor, g: float, memory: Memory) -> torch.Tensor:
        """Return s u + g (c - s u)."""
        u = u * ((c * u).sum() / (u.square().sum() + 1e-8))
        return u + g * (c - u)


@dataclass(frozen=True)
class APG(Guider):
    """Adaptive projected guidance: v = c + (g - 1) (d_across + eta d_along).

    d = c - u + momentum times the d of the step before; where the norm of a latent frame of it exceeds the
    threshold, it is scaled down to that. d_along is the part of d along c, which saturates colours, and
    d_across the rest, frame by frame.

    Args:
        eta: share of the part along c, 0 to 1.
        threshold: above 0; None: no limit. It was chosen for frames of 480p and above.
        momentum: below 0 steps back from what earlier steps did; 0: none.

    Source: arXiv 2410.02416, algorithm 1; norms per frame and the constants are those in use with Wan.
    """

    name = "apg"

    eta: float = 0.0
    threshold: float | None = 55.0
    momentum: float = -0.75

    def __post_init__(self) -> None:
        check_real("eta", self.eta, 0, 1)
        check_real("momentum", self.momentum, -1, 1)
        if self.threshold is not None:
            check_real("threshold", self.threshold, 0, above=True, hint="None sets no limit")

    def guided(self, c: torch.Tensor, u: torch.Tensor, g: float, memory: Memory) -> torch.Tensor:
        """Return c + (g - 1) (d_across + eta d_along)."""
        d = c - u
        if self.momentum and "average" in memory:
            d = d + self.momentum * memory["average"]
        if self.momentum:
            memory["average"] = d
        if self.threshold is not None:
            d = d * (self.threshold / _norm(d).clamp(min=_TINY)).clamp(max=1)
        direction = c / _norm(c).clamp(min=_TINY)
        along = (d * direction).sum(_OF_A_FRAME, keepdim=True) * direction
        return c + (g - 1) * (d - along + self.eta * along)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=_OF_A_FRAME, keepdim=True)


@dataclass(frozen=True)
class TCFG(Guider):
    """Tangential damping: plain guidance, from u without its part across what c and u have in common.

    Of the two right singular vectors of the rows [c; u], u keeps its part along the first.

    Source: arXiv 2503.18137, algorithm 1.
    """

    name = "tcfg"

    def guided(self, c: torch.Tensor, u: torch.Tensor, g: float, memory: Memory) -> torch.Tensor:
        """Return u' + g (c - u')."""
        # The matrix of products [cc cu; cu uu] has the eigenvector (cos, sin), which gives the first singular
        # vector, and u's part along it. On a GPU the host does not wait, as it would for an SVD.
        cc, cu, uu = (c * c).sum(), (c * u).sum(), (u * u).sum()
        angle = torch.atan2(2 * cu, cc - uu) / 2
        cos, sin = angle.cos(), angle.sin()
        u = sin * (cos * c + sin * u)
        return u + g * (c - u)


@dataclass(frozen=True)
class MamboG(Guider):
    """MAMBO-G: v = u + g' (c - u) with g' = 1 + (g - 1) exp(-alpha |c - u| / |u|).

    Early steps, where c and u are far apart, are guided less.

    Args:
        alpha: 0 or more; 0 is plain guidance.

    Source: arXiv 2508.03442; diffusers, MagnitudeAwareGuidance.
    """

    name = "mambo-g"

    alpha: float = 8.0

    def __post_init__(self) -> None:
        check_real("alpha", self.alpha, 0)

    def guided(self, c: torch.Tensor, u: torch.Tensor, g: float, memory: Memory) -> torch.Tensor:
        """Return u + g' (c - u)."""
        d = c - u
        ratio = torch.linalg.vector_norm(d) / torch.linalg.vector_norm(u).clamp(min=_TINY)
        return u + (1 + (g - 1) * torch.exp(-self.alpha * ratio)) * d
