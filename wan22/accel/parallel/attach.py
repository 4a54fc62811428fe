"""Let a pipeline's ranks make its videos together."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .mesh import Groups, Layout, gathered, suggest
from .rows import RowParallel
from .sequence import SequenceParallel


class Parallel:
    """A pipeline whose work is shared among ranks, until detached.

    All ranks make the same calls, and each gets the whole result; the first one shows progress, and may save
    the video: `if parallel.first:`.

    Args:
        pipe: the pipeline; each rank has its own, of the same weights.
        layout: how many ranks share what.
        vae: whether they share the VAE's rows in decoding, too.

    Raises:
        ValueError: the layout does not suit, a step cache is enabled, or the VAE is compiled.
    """

    def __init__(self, pipe: Any, layout: Layout, vae: bool = True) -> None:
        layout.check(dist.get_world_size(), pipe.any_transformer.config.num_attention_heads)
        self.pipe, self.layout = pipe, layout
        self.groups = Groups.of(layout, pipe._execution_device.type)
        self._attached: list[SequenceParallel | RowParallel] = []
        try:
            if vae:
                self._attached.append(RowParallel(pipe.vae, self.groups.all))
            for model in pipe.transformers if layout.ring * layout.ulysses > 1 else ():
                self._attached.append(SequenceParallel(model, self.groups))
        except ValueError:  # all, or nothing
            for attached in self._attached:
                attached.detach()
            raise
        self._settings = getattr(pipe, "_progress_bar_config", {})
        if not self.first:
            pipe._progress_bar_config = {**self._settings, "disable": True}
        pipe.draw_seed = self._draw_seed
        if layout.cfg == 2:
            pipe.run_passes = self._run_passes

    def detach(self) -> None:
        """Let each rank make videos of its own, as before."""
        for attached in self._attached:
            attached.detach()
        self._attached = []
        self.pipe._progress_bar_config = self._settings
        for name in ("draw_seed", "run_passes"):
            vars(self.pipe).pop(name, None)

    @property
    def first(self) -> bool:
        """Whether this is the first rank."""
        return dist.get_rank(self.groups.all) == 0

    def _draw_seed(self) -> int:
        """Draw a seed on the first rank, for all."""
        drawn = [type(self.pipe).draw_seed(self.pipe)]
        dist.broadcast_object_list(drawn, group=self.groups.all, group_src=0)
        return drawn[0]

    def _run_passes(self, passes: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """Run one of the two passes of a step, and get the other from the ranks that ran it."""
        if len(passes) == 1:
            return [passes[0]()]
        own = passes[dist.get_rank(self.groups.guidance)]()
        return gathered(own, self.groups.guidance)


def parallelize(
    pipe: Any,
    *,
    ring: int | None = None,
    ulysses: int | None = None,
    cfg: int | None = None,
    vae: bool = True,
) -> Parallel:
    """Let the ranks of torchrun make a pipeline's videos together.

    Args:
        pipe: the pipeline, on this rank's device.
        ring: ranks that pass keys and values around.
        ulysses: ranks that exchange tokens for heads, a divisor of the heads.
        cfg: 2: each pass of guidance runs on half of the ranks; 1: both run on all. Where none of the three
            is given it is the layout that moves the least, see `suggest`; where some are, the others are 1.
        vae: whether the ranks share the VAE's rows in decoding, too.

    Returns: the ranks; `detach()` undoes it.

    Raises:
        ValueError: this is no rank of several, or they cannot be shared out so; the message says how.
    """
    ranks = _join()
    if ring is ulysses is cfg is None:
        guided = pipe.preset.guidance_scale > 1
        return Parallel(pipe, suggest(ranks, pipe.any_transformer.config.num_attention_heads, guided), vae)
    given = {"ring": ring, "ulysses": ulysses, "cfg": cfg}
    return Parallel(pipe, Layout(**{name: value for name, value in given.items() if value is not None}), vae)


def _join() -> int:
    """Join the other ranks, if that has not been done, and return how many there are."""
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError("this is one process; start it with torchrun --nproc-per-node=2, for two GPUs")
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_world_size()
