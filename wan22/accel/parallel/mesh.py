"""How ranks share a pipeline's work: a mesh of guidance passes, rings and Ulysses groups.

Shapes: b batch, l tokens of all ranks together, c of one, n heads, d head size.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...checks import check_positive_int


@dataclass(frozen=True)
class Layout:
    """How many ranks share what, as `parallelize` describes; their product is the number of ranks."""

    ring: int = 1
    ulysses: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        for name, most in {"ring": None, "ulysses": None, "cfg": 2}.items():
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name), most))

    @property
    def shares_tokens(self) -> bool:
        """Whether each rank has a part of a video's tokens."""
        return self.ring * self.ulysses > 1

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.ring * self.ulysses * self.cfg

    def check(self, ranks: int, heads: int) -> None:
        """Refuse a layout that is for another number of ranks, or does not divide the transformer's heads."""
        nearest = suggest(ranks, heads, guided=self.cfg == 2)
        advice = f"say ring={nearest.ring}, ulysses={nearest.ulysses}, cfg={nearest.cfg}"
        if self.ranks != ranks:
            asked = f"ring={self.ring} x ulysses={self.ulysses} x cfg={self.cfg} is {self.ranks} ranks"
            raise ValueError(f"{asked}, and there are {ranks}; {advice}")
        if heads % self.ulysses:
            raise ValueError(f"ulysses={self.ulysses} cannot share {heads} heads equally; {advice}")


def suggest(ranks: int, heads: int, guided: bool = False) -> Layout:
    """Return the layout that moves the fewest bytes.

    With guidance each pass runs on half of the ranks, if their number is even. Within a pass Ulysses goes as
    far as heads can be divided, and rings take the rest.
    """
    cfg = 2 if guided and ranks % 2 == 0 else 1
    each = ranks // cfg
    ulysses = max(u for u in range(1, each + 1) if each % u == 0 and heads % u == 0)
    return Layout(each // ulysses, ulysses, cfg)


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank belongs to."""

    ring: dist.ProcessGroup  # the ranks that pass keys and values around
    ulysses: dist.ProcessGroup  # the ranks that exchange tokens for heads
    sequence: dist.ProcessGroup  # all ranks that share a pass, in the order of their tokens
    guidance: dist.ProcessGroup  # the ranks that have the same tokens in each pass
    mesh: DeviceMesh  # all ranks, along one axis

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> "Groups":
        """Return a layout's groups, made once; a collective call."""
        return _made(layout, device_type, dist.group.WORLD)

    @property
    def all(self) -> dist.ProcessGroup:
        """All ranks."""
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        """This rank's position in the order of the tokens."""
        return dist.get_rank(self.sequence)


@cache
def _made(layout: Layout, device_type: str, world: dist.ProcessGroup) -> Groups:
    # The ranks of a Ulysses group are neighbours, so that together they hold consecutive tokens.
    sizes = layout.cfg, layout.ring, layout.ulysses
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("cfg", "ring", "ulysses"))
    pair = layout.cfg, layout.ring * layout.ulysses
    passes = init_device_mesh(device_type, pair, mesh_dim_names=("cfg", "sequence"))
    return Groups(
        ring=mesh["ring"].get_group(),
        ulysses=mesh["ulysses"].get_group(),
        sequence=passes["sequence"].get_group(),
        guidance=passes["cfg"].get_group(),
        mesh=init_device_mesh(device_type, (layout.ranks,), mesh_dim_names=("all",)),
    )


def gathered(x: torch.Tensor, group: dist.ProcessGroup, to_first: bool = False) -> list[torch.Tensor]:
    """Return each rank's tensor, all of one shape, in the order of the ranks.

    With to_first only the first rank gets them; the others get an empty list.
    """
    x = x.contiguous()
    receives = not to_first or dist.get_rank(group) == 0
    parts = [torch.empty_like(x) for _ in range(group.size())] if receives else []
    if to_first:
        dist.gather(x, parts or None, group=group, group_dst=0)
    else:
        dist.all_gather(parts, x, group=group)
    return parts
