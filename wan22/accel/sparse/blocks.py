"""Attention by a mask of blocks: each block of queries attends to some blocks of keys, and to all of each.

On CUDA with Triton, FlexAttention computes it, compiled at its first call and once more for another size.
Elsewhere the keys of each block of queries are gathered, and PyTorch's own kernel attends to them: the same
mask, so that what holds on a CPU holds on a GPU.

Shapes: b batch, l tokens, n heads, d head size, q k blocks of queries and of keys.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ...models.attention import native
from ...models.fused import has_compiler
from ...private_apis import allow_recompiling

# Masks are kept by size of video and by settings. A mask of 75,600 tokens has 0.35 MB, FlexAttention's form
# of it 5.6 MB.
MOST_MASKS = 8
# FlexAttention's kernels take tiles of up to 128 tokens, which must divide the mask's blocks.
FLEX_BLOCK = 128


class BlockSparse(NamedTuple):
    """An attention kernel, see `block_sparse`."""

    kept: torch.Tensor  # "q k"
    block: int

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /) -> torch.Tensor:
        """Attend from "b l n d" to some of "b l n d"."""
        attended: torch.Tensor = torch.ops.wan22.block_sparse_attention(
            query, key, value, self.kept, self.block
        )
        return attended


def block_sparse(kept: torch.Tensor, block: int) -> BlockSparse:
    """Return what attends by a mask.

    Args:
        kept: which blocks of keys each block of queries attends to, "q k", bool, on the tokens' device; at
            least one in each row.
        block: tokens of a block; the last one may have fewer.
    """
    _define_operator()
    return BlockSparse(kept, block)


@cache
def _define_operator() -> None:
    """Make it an operator, which torch.compile does not trace: compiled blocks serve all masks."""
    operator = torch.library.custom_op("wan22::block_sparse_attention", attend, mutates_args=())
    operator.register_fake(lambda query, key, value, kept, block: query.new_empty(query.shape))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, block: int
) -> torch.Tensor:
    """Attend by a mask, as fast as the device can."""
    tokens = query.shape[1]
    if len(kept) != -(-tokens // block):
        raise ValueError(f"a mask of {len(kept)} blocks of {block} tokens is not for {tokens} tokens")
    compute = by_flex_attention if query.is_cuda and has_compiler() else by_gathering
    return compute(query, key, value, kept, block).contiguous()


def by_gathering(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, block: int
) -> torch.Tensor:
    """Attend by a mask, one block of queries after the other."""
    out, tokens = torch.empty_like(query), query.shape[1]
    for row, runs in enumerate(_runs(kept, block, tokens)):
        own = slice(row * block, (row + 1) * block)
        k, v = (torch.cat([x[:, run] for run in runs], dim=1) for x in (key, value))
        out[:, own] = native(query[:, own], k, v)
    return out


def by_flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, block: int
) -> torch.Tensor:
    """Attend by a mask with FlexAttention, as one compiled kernel."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # b l n d -> b n l d
    mask = flex_mask(kept, block, query.shape[1])
    return _compiled_flex_attention()(q, k, v, block_mask=mask).transpose(1, 2)


@cache
def _compiled_flex_attention() -> Any:
    """Return FlexAttention, compiled for each size: not all backends compile it for variable ones."""
    from torch.nn.attention.flex_attention import flex_attention

    allow_recompiling()
    return torch.compile(flex_attention, dynamic=False)


# A tensor hashes by its identity, and the cache keeps it alive as long as what is made of it.
@lru_cache(maxsize=MOST_MASKS)
def flex_mask(kept: torch.Tensor, block: int, tokens: int) -> Any:
    """Return FlexAttention's form of a mask of blocks for l tokens, a BlockMask.

    Its kernel looks at single tokens in the last block of keys alone, if that is not full.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def allowed(b: torch.Tensor, n: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return kept[q // block, k // block] & (k < tokens)

    partial = torch.zeros_like(kept)
    if tokens % block:
        partial[:, -1] = kept[:, -1]
    blocks = (*_ordered(partial), *_ordered(kept & ~partial))
    lengths = (tokens, tokens)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=block, mask_mod=allowed, seq_lengths=lengths)


def _ordered(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of blocks in each row, "1 1 q", and their indices before all others, "1 1 q k"."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@lru_cache(maxsize=MOST_MASKS)
def _runs(kept: torch.Tensor, block: int, tokens: int) -> list[list[slice]]:
    """Return for each block of queries the runs of tokens that it attends to."""
    found = []
    for row in kept.cpu():
        edges = torch.nonzero(torch.diff(row.int(), prepend=torch.zeros(1), append=torch.zeros(1))).flatten()
        pairs = (edges * block).clamp(max=tokens).view(-1, 2).tolist()
        found.append([slice(start, stop) for start, stop in pairs])
    return found
