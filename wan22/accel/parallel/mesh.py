"""Which rank does what: processes in a mesh of rings and Ulysses groups.

Shapes: b batch, l tokens of all ranks together, c of one, n heads, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Layout:
    """How many ranks share what; their product is the number of ranks.

    Args:
        ring: ranks that pass keys and values around; any number.
        ulysses: ranks that exchange tokens for heads; it divides the heads.
    """

    ring: int = 1
    ulysses: int = 1

    @property
    def ranks(self) -> int:
        """The number of ranks, each of which has its part of the tokens."""
        return self.ring * self.ulysses

    def check(self, ranks: int, heads: int) -> None:
        """Refuse a layout that does not suit.

        Args:
            ranks: that there are.
            heads: of the transformer.

        Raises:
            ValueError: it is for another number of ranks, or the heads cannot be shared so.
        """
        for name in ("ring", "ulysses"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int, at least 1; say 1")
        nearest = suggest(ranks, heads)
        advice = f"say ring={nearest.ring}, ulysses={nearest.ulysses}"
        if self.ranks != ranks:
            asked = f"ring={self.ring} x ulysses={self.ulysses} is {self.ranks} ranks"
            raise ValueError(f"{asked}, and there are {ranks}; {advice}")
        if heads % self.ulysses:
            raise ValueError(f"ulysses={self.ulysses} cannot share {heads} heads equally; {advice}")


def suggest(ranks: int, heads: int) -> Layout:
    """Return the layout that moves the least: Ulysses as far as the heads go, rings for the rest."""
    ulysses = max(u for u in range(1, ranks + 1) if ranks % u == 0 and heads % u == 0)
    return Layout(ranks // ulysses, ulysses)


@dataclass(frozen=True)
class Groups:
    """The processes that this one exchanges tensors with.

    Args:
        ring: its ring.
        ulysses: its Ulysses group.
        sequence: both: all ranks, in the order of their tokens.
    """

    ring: Any
    ulysses: Any
    sequence: Any

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> "Groups":
        """Make the groups; a collective call, which all ranks make."""
        # The ranks of a Ulysses group are neighbours: their tokens, put together, are a run of the video's.
        mesh = init_device_mesh(
            device_type, (layout.ring, layout.ulysses), mesh_dim_names=("ring", "ulysses")
        )
        return cls(mesh["ring"].get_group(), mesh["ulysses"].get_group(), mesh._flatten().get_group())

    @property
    def rank(self) -> int:
        """This process's place in the order of the tokens."""
        return dist.get_rank(self.sequence)
