"""A transformer's tokens shared among ranks; the result is that of one rank, up to rounding.

Each rank has a run of the tokens, and only self-attention needs those of the others. Ulysses exchanges tokens
for heads: each rank of a group gets all the group's tokens of some heads, and gives the result back. A ring
passes keys and values on, and adds up what each part of them gives. Both together: rings of Ulysses groups.
Where the tokens cannot be shared equally, zeros fill up the last ranks', which nobody attends to.

Shapes: b batch, l tokens of all ranks together, c of one, n heads, d head size, m model size; k rows of time.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...models.attention import Kernel, attention, register, unregister
from ...private_apis import (
    all_to_all_single,
    efficient_attention,
    flash_attention,
    flash_attention_for_cpu,
    permute_tensor,
    wait_tensor,
)
from ..offload.layout import blocks_of
from .mesh import Groups, gathered

_numbers = itertools.count()


class SequenceParallel:
    """Shares the tokens of transformers among ranks, until detached.

    All ranks call a transformer with the same arguments, and get the same result.

    Args:
        models: WanTransformer3DModels that run by turns, a pipeline's; their kernel computes attention among
            heads. Within a ring it is PyTorch's FlashAttention, or the memory-efficient one, which tell what
            parts are added up by.
        groups: the ranks.

    Raises:
        ValueError: a step cache is enabled: each rank would decide by its own tokens what to skip.
    """

    def __init__(self, models: Sequence[Any], groups: Groups) -> None:
        for model in models:
            self._refuse_cache(model)
        self.groups = groups
        self.rank, self.ranks = groups.rank, dist.get_world_size(groups.sequence)
        self.name = f"sequence parallel {next(_numbers)}"
        self.tokens = 0  # of the video that is being computed
        self._shared: tuple[Any, ...] = ()  # its time rows and rotary tables, of this rank's tokens
        chains: list[list[Any]] = [blocks_of(model) for model in models]
        self._firsts = [chain[0] for chain in chains]
        self._attentions: list[Any] = [block.attn1 for chain in chains for block in chain]
        # One kernel for all of them, so that compiled blocks are compiled once.
        self._compute_by(self._attentions[0].backend)
        self._handles: list[Any] = [model.register_forward_pre_hook(self._refuse_cache) for model in models]
        for chain in chains:
            self._handles += [block.register_forward_pre_hook(self._before) for block in chain]
            self._handles.append(chain[-1].register_forward_hook(self._after))

    def detach(self) -> None:
        """Compute alone, as before."""
        for handle in self._handles:
            handle.remove()
        for own in self._attentions:
            if own.backend == self.name:  # or somebody chose another since
                own.backend = self.backend
        unregister(self.name)
        self._handles = []

    def _refuse_cache(self, model: Any, *_: Any) -> None:
        """Refuse a step cache, now or at the next call.

        Raises:
            ValueError: one is enabled.
        """
        if getattr(model, "is_cache_enabled", False):
            raise ValueError("a step cache is enabled, and its ranks would not agree; call disable_cache()")

    def _compute_by(self, backend: str) -> None:
        """Let a kernel compute what the ranks exchange tokens for."""
        self.backend = backend
        register(self.name, Kernel(self._kernel(backend), inner=backend))
        for own in self._attentions:
            own.backend = self.name

    # ---- around the blocks ----

    def _before(self, block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a block this rank's part of what goes by tokens."""
        x, text, time, rotary, *rest = arguments
        if block.attn1.backend != self.name:  # somebody chose another since
            self._compute_by(block.attn1.backend)
        if any(block is first for first in self._firsts):
            self.tokens = x.shape[1]
            self._shared = self._rows(time), tuple(map(self._part, rotary))
            x = self._part(x)
        return (x, text, *self._shared, *rest)

    def _after(self, block: nn.Module, arguments: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        """Put the tokens of all ranks together behind the last block."""
        self._shared = ()
        return torch.cat(gathered(x, self.groups.sequence), dim=1)[:, : self.tokens]

    @property
    def _run(self) -> int:
        """Tokens c of a rank, the filled up ones included."""
        return -(-self.tokens // self.ranks)

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of "b l …", filled up with zeros."""
        start = self.rank * self._run
        # A copy, as the blocks' results are: compiled code would tell a view from them.
        part = x[:, start : start + self._run].clone(memory_format=torch.contiguous_format)
        missing = self._run - part.shape[1]
        return F.pad(part, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else part

    def _rows(self, time: torch.Tensor) -> torch.Tensor:
        """Return the time's rows of this rank's tokens: all of "b 1 6 m", one per token otherwise."""
        rows = time.shape[1]
        if rows == 1:
            return time
        start = self.rank * self._run
        tokens = torch.arange(start, start + self._run, device=time.device).clamp_(max=self.tokens - 1)
        return time[:, tokens * rows // self.tokens]

    # ---- attention ----

    def _kernel(self, backend: str) -> Callable[..., torch.Tensor]:
        """Return what computes self-attention of a rank's tokens to those of all ranks."""

        def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            q, k, v = self._to_heads(torch.stack((query, key, value)))
            ring = dist.get_world_size(self.groups.ring)
            if ring == 1:
                out = attention(q, k[:, : self.tokens], v[:, : self.tokens], backend)
            else:
                out = self._ring(q, torch.stack((k, v)))
            return self._to_tokens(out)

        return compute

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange "3 b c n d" for all the group's tokens of some heads."""
        size = dist.get_world_size(self.groups.ulysses)
        if size == 1:
            return x
        parts = x.unflatten(3, (size, -1)).movedim(3, 0)  # 3 b c n d -> u 3 b c n/u d
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)  # -> 3 b (u c) n/u d

    def _to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange "b (u c) n/u d" for all heads of this rank's tokens."""
        size = dist.get_world_size(self.groups.ulysses)
        if size == 1:
            return x
        parts = x.unflatten(1, (size, -1)).movedim(1, 0)  # b (u c) n/u d -> u b c n/u d
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)  # -> b c n d

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Send each rank of the Ulysses group its part, and return what they sent."""
        sent = all_to_all_single(parts.contiguous(), None, None, self.groups.ulysses)
        return wait_tensor(sent)

    def _ring(self, query: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Attend to the keys and values "2 b s n d" of each rank of the ring in turn."""
        size, rank = dist.get_world_size(self.groups.ring), dist.get_rank(self.groups.ring)
        onwards = [(i + 1) % size for i in range(size)]
        total: tuple[torch.Tensor, torch.Tensor] | None = None
        for step in range(size):
            # The next block travels while this one is attended to.
            last = step + 1 == size
            coming = None if last else permute_tensor(block.flatten(), onwards, self.groups.ring)
            owner, run = (rank - step) % size, block.shape[2]
            filled = min(max(self.tokens - owner * run, 0), run)
            if filled:
                part = attention_and_logits(query, block[0, :, :filled], block[1, :, :filled])
                total = part if total is None else added(*total, *part)
            block = block if coming is None else wait_tensor(coming).view_as(block)
        assert total is not None, "the first rank of a ring has tokens"
        return total[0].to(query.dtype)


def attention_and_logits(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to a part of the keys.

    Args:
        query: "b l n d".
        key: "b s n d".
        value: "b s n d".

    Returns: the result "b l n d", and the logarithm of the sum that it was divided by "b l n 1"; float32, or
        float64.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.device.type == "cpu":
        out, logits = flash_attention_for_cpu(q, k, v)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, logits = flash_attention(q, k, v)[:2]
    else:
        out, logits = efficient_attention(q, k, v, None, True)[:2]
        logits = logits[:, :, : q.shape[2]]  # whose length is a multiple of 32
    return out.transpose(1, 2).to(wide), logits.transpose(1, 2)[..., None].to(wide)


def added(
    out: torch.Tensor, weight: torch.Tensor, part: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the results of two sets of keys, each with the logarithm of its sum."""
    both = torch.logaddexp(weight, logits)
    return out * (weight - both).exp() + part * (logits - both).exp(), both
