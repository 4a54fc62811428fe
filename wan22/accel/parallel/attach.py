"""Let a pipeline's ranks make its videos together."""

import os
from typing import Any

import torch
import torch.distributed as dist

from .mesh import Groups, Layout, suggest
from .sequence import SequenceParallel


class Parallel:
    """A pipeline whose transformers share the tokens among ranks, until detached.

    All ranks make the same calls, and each gets the whole result.

    Args:
        pipe: the pipeline; each rank has its own, of the same weights.
        layout: how many ranks share what; None: by the number of ranks and heads.

    Raises:
        ValueError: this is no rank of several, the layout does not suit, or a step cache is enabled.
    """

    def __init__(self, pipe: Any, layout: Layout | None = None) -> None:
        config = pipe.any_transformer.config
        ranks = _join()
        layout = layout or suggest(ranks, config.num_attention_heads)
        layout.check(ranks, config.num_attention_heads)
        self.pipe, self.layout = pipe, layout
        self.groups = Groups.of(layout, pipe._execution_device.type)
        self._attached = [SequenceParallel(model, self.groups) for model in pipe.transformers]
        pipe.draw_seed = self._draw_seed

    def detach(self) -> None:
        """Let each rank make videos of its own, as before."""
        for attached in self._attached:
            attached.detach()
        self._attached = []
        vars(self.pipe).pop("draw_seed", None)

    def _draw_seed(self) -> int:
        """Draw a seed on the first rank, for all."""
        drawn = [type(self.pipe).draw_seed(self.pipe)]
        dist.broadcast_object_list(drawn, group=self.groups.sequence, group_src=0)
        return drawn[0]


def parallelize(pipe: Any, *, ring: int | None = None, ulysses: int | None = None) -> Parallel:
    """Let the ranks of torchrun make a pipeline's videos together: each computes a part of the tokens.

    Args:
        pipe: the pipeline, on this rank's device.
        ring: ranks that pass keys and values around; default is what Ulysses leaves.
        ulysses: ranks that exchange tokens for heads, a divisor of the heads; default is the most.

    Returns: the ranks; `detach()` undoes it.

    Raises:
        ValueError: this is no rank of several, or they cannot be shared out so; the message says how.
    """
    if ring is None and ulysses is None:
        return Parallel(pipe)
    ranks = _join()
    if ring is None:
        ring = max(1, ranks // (ulysses or 1))
    return Parallel(pipe, Layout(ring, max(1, ranks // ring) if ulysses is None else ulysses))


def _join() -> int:
    """Join the other ranks, if that has not been done, and return how many there are."""
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError("this is one process; start it with torchrun --nproc-per-node=2, for two GPUs")
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_world_size()
