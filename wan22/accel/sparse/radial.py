"""The mask of radial attention: how far a token sees in another frame halves as the frames' distance doubles.

Shapes: t h w the grid of tokens, s stretches of queries, p tokens of a frame, q k blocks.
"""

from functools import lru_cache

import torch

from .blocks import MOST_MASKS


@lru_cache(maxsize=MOST_MASKS)
def radial_mask(grid: tuple[int, int, int], decay: float, block: int) -> torch.Tensor:
    """Return which blocks of keys each block of queries attends to, "q k", bool.

    A token sees all of its own frame, of the frames beside it, and of the first one. In a frame at a distance
    d it sees the tokens whose places differ by at most

        decay 2^bits(p) / 2^bits(d), or `block` if that is less,

    for p tokens of a frame, where bits(x) is the number of binary digits. Where 2^bits(p) / 2^bits(d) is less
    than `block`, it sees frames only whose distance is a multiple of `block` divided by that.

    A block is kept if, of the tokens of some frame in it that any of its queries sees, more than 60 % are
    seen by more than a third of the queries. Beyond the source, frames may begin within blocks, and the last
    block may be short: it counts the queries that there are. The diagonal is kept in any case.

    Args:
        grid: tokens along "t h w".
        decay: factor of the windows, 0 or more.
        block: tokens of a block.
    Source: arXiv 2506.19852; mit-han-lab/radial-attention radial_attn/attn_mask.py, gen_log_mask_shrinked.
    """
    frames, in_frame = grid[0], grid[1] * grid[2]
    tokens = frames * in_frame
    blocks = -(-tokens // block)
    # Stretches of queries that lie in one block and in one frame.
    cuts = sorted({*range(0, tokens, block), *range(0, tokens, in_frame), tokens})
    starts, ends = torch.tensor(cuts[:-1], dtype=torch.int32), torch.tensor(cuts[1:], dtype=torch.int32)
    frame, block_of = starts // in_frame, starts // block
    first, last = starts % in_frame, (ends - 1) % in_frame
    queries = (tokens - block * torch.arange(blocks)).clamp(max=block)
    places = torch.arange(in_frame, dtype=torch.int32)
    kept = torch.eye(blocks, dtype=torch.bool)
    for key_frame in range(frames):
        reaches = [_reach(abs(i - key_frame), in_frame, decay, block) for i in range(frames)]
        reach = torch.tensor(reaches if key_frame else [in_frame] * frames, dtype=torch.int32)[frame, None]
        # Of each stretch, how many queries see each token of the frame.
        seen = (
            torch.minimum(last[:, None], places + reach) - torch.maximum(first[:, None], places - reach) + 1
        )
        seen = torch.zeros(blocks, in_frame, dtype=torch.int32).index_add_(0, block_of, seen.clamp_(min=0))
        often = 3 * seen > queries[:, None]
        key_block = (key_frame * in_frame + places) // block
        count = torch.zeros(2, blocks, blocks, dtype=torch.int32)
        count.index_add_(2, key_block, torch.stack((often, seen > 0)).int())
        kept |= 5 * count[0] > 3 * count[1]
    return kept


def _reach(distance: int, in_frame: int, decay: float, block: int) -> int:
    """Return by how much places of tokens differ at most that see one another; -1 if none do."""
    if distance <= 1:
        return in_frame
    width = 2 ** in_frame.bit_length() / 2 ** distance.bit_length()
    if width < block and distance % int(block / width):
        return -1
    return int(min(max(decay * width, block), in_frame))
