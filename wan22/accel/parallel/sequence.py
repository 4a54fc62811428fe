"""A transformer's tokens shared among ranks; the result is that of one rank, up to rounding.

Each rank has consecutive tokens, and only self-attention needs those of the others. Ulysses exchanges tokens
for heads: each rank of a group computes all the group's tokens of some heads, and sends the result back. A
ring passes keys and values on, and combines the results of its parts by their log-sum-exp. Both together are
rings of Ulysses groups. Where ranks cannot have equally many tokens, the last ranks' are padded with zeros,
which are no keys of any query.

Shapes: b batch, l tokens of all ranks together, c of one, n heads, d head size, m model size, k times.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...checkpoints.loading.diffusers_attention import DiffusersAttention, WanAttnProcessor
from ...checkpoints.loading.models import is_ours
from ...models.attention import Kernel, attention, register, unregister
from ...models.self_attention import AttentionKernel
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

    All ranks call a transformer with the same arguments, and get the same result. The models are those of a
    pipeline, which run one at a time. Their own kernel computes attention within Ulysses groups; in a ring,
    PyTorch's flash or memory-efficient one, which return the log-sum-exp. A step cache is refused, as each
    rank would decide by its own tokens what to skip.
    """

    def __init__(self, models: Sequence[Any], groups: Groups) -> None:
        for model in models:
            self._refuse_cache(model)
            if not is_ours(model):
                raise ValueError(
                    f"the tokens of a {type(model).__name__} that is not wan22's cannot be shared; load it "
                    "with wan22.WanTransformer3DModel, or share the passes of guidance alone: cfg=2"
                )
            layers = (layer for layer in model.modules() if isinstance(layer, DiffusersAttention))
            if any(type(layer.processor) is not WanAttnProcessor for layer in layers):
                raise ValueError(
                    "a given attention processor does not know of other ranks' tokens; set_attn_processor("
                    "WanAttnProcessor()) takes it away"
                )
        self.groups = groups
        self.rank, self.ranks = groups.rank, dist.get_world_size(groups.sequence)
        self.name = f"sequence parallel {next(_numbers)}"
        self.tokens = 0  # of the video that is being computed
        # Modulation and rotary tables of this rank's tokens, by the identity of the modulation of all tokens:
        # several samples may be on their way through the blocks.
        self._shared: dict[int, tuple[Any, ...]] = {}
        chains: list[list[Any]] = [blocks_of(model) for model in models]
        self._firsts, self._lasts = ([chain[i] for chain in chains] for i in (0, -1))
        self._attentions: list[Any] = [block.attn1 for chain in chains for block in chain]
        # One kernel for all of them, so that compiled blocks are compiled once.
        self._compute_by(self._attentions[0].backend)
        self._handles: list[Any] = [model.register_forward_pre_hook(self._refuse_cache) for model in models]
        for model in models:
            self._handles.append(model.register_forward_pre_hook(self._refuse_skips, with_kwargs=True))
        for chain in chains:
            self._handles += [block.register_forward_pre_hook(self._before) for block in chain]
        for tokens, head in ((model.tokens, model.head) for model in models):
            self._handles.append(tokens.register_forward_hook(self._divide))
            self._handles.append(head.register_forward_pre_hook(self._before_head))
            self._handles.append(head.register_forward_hook(self._gather))

    def detach(self) -> None:
        """Let each rank compute all tokens, as before."""
        for handle in self._handles:
            handle.remove()
        for own in self._attentions:
            if own.backend == self.name:  # unless another has been chosen since
                own.backend = self.backend
        unregister(self.name)
        self._handles = []

    def _refuse_cache(self, model: Any, *_: Any) -> None:
        if getattr(model, "is_cache_enabled", False):
            raise ValueError("a step cache is enabled, and its ranks would not agree; call disable_cache()")

    def _refuse_skips(self, model: Any, _: Any, options: Mapping[str, Any]) -> None:
        """Refuse to skip the layers before and after which ranks exchange tokens."""
        last = len(model.blocks) - 1
        if skipped := {0, last} & set(options.get("skip_layers", ())):
            raise ValueError(
                f"layer {min(skipped)} cannot be skipped where ranks share tokens: layers 1 to {last - 1} can"
            )

    def _compute_by(self, backend: str) -> None:
        self.backend = backend
        register(self.name, Kernel(self._kernel(backend), inner=backend))
        for own in self._attentions:
            own.backend = self.name

    # ---- around the blocks ----

    def _before(self, block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace a block's arguments by their parts for this rank's tokens."""
        x, text, time, rotary, *rest = arguments
        if block.attn1.backend != self.name:  # another has been chosen since
            self._compute_by(block.attn1.backend)
        if any(block is first for first in self._firsts):
            self._shared[id(time)] = self._times(time), tuple(map(self._part, rotary))
        shared = self._shared[id(time)]
        if any(block is last for last in self._lasts):
            del self._shared[id(time)]
        return (x, text, *shared, *rest)

    def _divide(self, tokens: nn.Module, arguments: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens."""
        self.tokens = x.shape[1]
        return self._part(x)

    def _before_head(self, head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, temb, *rest = arguments
        return (x, self._times(temb), *rest)

    def _gather(self, head: nn.Module, arguments: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        """Return the velocities of all tokens, which are far smaller than the tokens."""
        return torch.cat(gathered(x, self.groups.sequence), dim=1)[:, : self.tokens]

    def mean(self, values: torch.Tensor) -> float:
        """Return the mean over all ranks' tokens, given "… c" of this rank's, padding included."""
        start = self.rank * self._own_tokens
        own = values[..., : max(0, min(self._own_tokens, self.tokens - start))]
        sums = torch.stack((own.sum(), own.new_tensor(own.numel())))
        dist.all_reduce(sums, dist.ReduceOp.SUM, self.groups.sequence)
        return float(sums[0] / sums[1])

    @property
    def _own_tokens(self) -> int:
        """Tokens c of a rank, padding included."""
        return -(-self.tokens // self.ranks)

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of "b l …", padded with zeros."""
        start = self.rank * self._own_tokens
        # A copy, as the blocks' results are: compiled code is compiled anew for a view.
        part = x[:, start : start + self._own_tokens].clone(memory_format=torch.contiguous_format)
        missing = self._own_tokens - part.shape[1]
        return F.pad(part, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else part

    def _times(self, time: torch.Tensor) -> torch.Tensor:
        """Return the modulation "b k …" for this rank's tokens: as it is for k = 1, else one per token."""
        times = time.shape[1]
        if times == 1:
            return time
        start = self.rank * self._own_tokens
        tokens = torch.arange(start, start + self._own_tokens, device=time.device).clamp_(max=self.tokens - 1)
        return time[:, tokens * times // self.tokens]

    # ---- attention ----

    def _kernel(self, backend: str) -> Callable[..., torch.Tensor]:
        """Return the kernel of self-attention of a rank's tokens to those of all ranks."""

        def compute(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            instead: AttentionKernel | None = None,
        ) -> torch.Tensor:
            q, k, v = self._to_heads(torch.stack((query, key, value)))
            ring = dist.get_world_size(self.groups.ring)
            if instead is not None:
                check_not_in_ring(ring)
                q, k, v = (x[:, : self.tokens] for x in (q, k, v))
                out = instead(q, k, v)
                out = F.pad(out, (0, 0, 0, 0, 0, self.ranks * self._own_tokens - self.tokens))
            elif ring == 1:
                out = attention(q, k[:, : self.tokens], v[:, : self.tokens], backend)
            else:
                out = self._ring(q, torch.stack((k, v)))
            return self._to_tokens(out)

        return compute

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange "3 b c n d", this rank's tokens, for all of some heads, "3 b (u c) n/u d"."""
        size = dist.get_world_size(self.groups.ulysses)
        if size == 1:
            return x
        parts = x.unflatten(3, (size, -1)).movedim(3, 0)  # 3 b c n d -> u 3 b c n/u d
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)  # -> 3 b (u c) n/u d

    def _to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange "b (u c) n/u d" for all heads of this rank's tokens, "b c n d"."""
        size = dist.get_world_size(self.groups.ulysses)
        if size == 1:
            return x
        parts = x.unflatten(1, (size, -1)).movedim(1, 0)  # b (u c) n/u d -> u b c n/u d
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)  # -> b c n d

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Send the i-th part to the i-th rank of the Ulysses group, and return the parts received."""
        sent = all_to_all_single(parts.contiguous(), None, None, self.groups.ulysses)
        return wait_tensor(sent)

    def _ring(self, query: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Attend to the keys and values "2 b s n d" of each rank of the ring, one after the other."""
        size, rank = dist.get_world_size(self.groups.ring), dist.get_rank(self.groups.ring)
        receivers = [(i + 1) % size for i in range(size)]
        total: tuple[torch.Tensor, torch.Tensor] | None = None
        for step in range(size):
            # The next block travels while this one is attended to.
            last = step + 1 == size
            following = None if last else permute_tensor(block.flatten(), receivers, self.groups.ring)
            owner, length = (rank - step) % size, block.shape[2]
            keys = min(max(self.tokens - owner * length, 0), length)  # without padding
            if keys:
                part = attention_and_lse(query, block[0, :, :keys], block[1, :, :keys])
                total = part if total is None else combined(*total, *part)
            block = block if following is None else wait_tensor(following).view_as(block)
        assert total is not None, "the first rank of a ring has tokens"
        return total[0].to(query.dtype)


def check_not_in_ring(ring: int) -> None:
    """Refuse sparse self-attention where a rank sees the keys of one rank of a ring at a time."""
    if ring > 1:
        passing = f"sparse attention needs all keys at once, and ring={ring} has them pass by"
        raise ValueError(f"{passing}; share heads: ulysses=")


def attention_and_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from "b l n d" to a part of the keys and values, "b s n d".

    Returns: the result "b l n d", and the log-sum-exp of the scores "b l n 1"; float32 or float64.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.device.type == "cpu":
        out, lse = flash_attention_for_cpu(q, k, v)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, lse = flash_attention(q, k, v)[:2]
    else:
        out, lse = efficient_attention(q, k, v, None, True)[:2]
        lse = lse[:, :, : q.shape[2]]  # padded to a multiple of 32
    return out.transpose(1, 2).to(wide), lse.transpose(1, 2)[..., None].to(wide)


def combined(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention to two sets of keys, each with its log-sum-exp."""
    both = torch.logaddexp(lse, other_lse)
    return out * (lse - both).exp() + other * (other_lse - both).exp(), both
