"""The mask of radial attention, against its definition written out, and against the published function."""

from collections import Counter

import pytest
import torch

from wan22 import RadialAttention
from wan22.accel.sparse.radial import radial_mask


def token_mask(grid, decay, block):
    """Which tokens see which, frame pair by frame pair, "l l"."""
    frames, in_frame = grid[0], grid[1] * grid[2]
    power = 1
    while power <= in_frame:
        power *= 2
    apart = (torch.arange(in_frame)[:, None] - torch.arange(in_frame)[None, :]).abs()
    rows = []
    for i in range(frames):
        row = []
        for j in range(frames):
            d, halvings = abs(i - j), 0
            while 2**halvings <= d:
                halvings += 1
            width = power / 2**halvings
            sees = torch.ones_like(apart, dtype=torch.bool) if j == 0 or d <= 1 else None
            if sees is None:
                sees = apart <= max(width * decay, block)
                if width < block and d % int(block / width) != 0:
                    sees = torch.zeros_like(sees)
            row.append(sees)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def block_mask(grid, decay, block):
    """The definition, a block of queries at a time, and a token at a time."""
    tokens, in_frame = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
    sees, blocks = token_mask(grid, decay, block), -(-tokens // block)
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    for q in range(blocks):
        seen, often = Counter(), Counter()
        for token, density in enumerate(sees[q * block : (q + 1) * block].double().mean(0).tolist()):
            seen[token // block, token // in_frame] += density > 0
            often[token // block, token // in_frame] += density > 1 / 3
        for (k, frame), count in seen.items():
            kept[q, k] |= q == k or (count > 0 and often[k, frame] / count > 0.6)
    return kept


def published(grid, decay, block):
    """mit-han-lab/radial-attention's gen_log_mask_shrinked, for frames of whole blocks."""
    frames, in_frame = grid[0], grid[1] * grid[2]
    assert in_frame % block == 0
    each, sees = in_frame // block, token_mask(grid, decay, block)
    kept = torch.zeros(frames * each, frames * each, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            pair = sees[i * in_frame : (i + 1) * in_frame, j * in_frame : (j + 1) * in_frame]
            densities = pair.view(each, block, each, block).sum(1) / block
            high = (densities > 1 / 3).sum(-1) / ((densities > 0).sum(-1) + 1e-9)
            kept[i * each : (i + 1) * each, j * each : (j + 1) * each] = high > 0.6
    return kept


# Frames of whole blocks, of parts of blocks, of less than a block; a short last block, one frame, one token.
GRIDS = [(6, 4, 8), (7, 3, 5), (9, 2, 3), (5, 7, 7), (1, 3, 4), (4, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("block", [1, 4, 8, 32])
def test_the_definition(grid, decay, block):
    assert torch.equal(radial_mask(grid, decay, block), block_mask(grid, decay, block))


@pytest.mark.parametrize("grid", [(6, 4, 8), (20, 4, 8), (12, 8, 8)])
@pytest.mark.parametrize("decay", [0.2, 0.8, 2.0])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_frames_of_whole_blocks_are_masked_as_published(grid, decay, block):
    found = radial_mask(grid, decay, block)
    assert torch.equal(found, published(grid, decay, block))
    assert not found.all()


def test_the_first_frame_and_the_nearest_are_seen_by_all():
    frames, each = 16, 9
    kept = radial_mask((frames, 6, 6), 0.0, 4)
    assert kept[:, :each].all()
    assert not kept[:, each:].all()
    for frame in range(frames):
        rows = slice(frame * each, (frame + 1) * each)
        assert kept[rows, max(0, (frame - 1) * each) : (frame + 2) * each].all()


def test_less_decay_keeps_less():
    grid = (12, 8, 8)
    shares = [RadialAttention(decay=decay, block=4).share(grid) for decay in (0, 0.4, 0.8, 100)]
    assert shares == sorted(set(shares)) and shares[0] > 0 and shares[-1] <= 1


@pytest.mark.parametrize(
    ("grid", "share"),
    [
        ((21, 30, 52), 0.406),  # 832x480, 81 frames
        ((31, 30, 52), 0.325),  # 121
        ((21, 45, 80), 0.359),  # 1280x720, 81 frames
        ((31, 45, 80), 0.282),  # 121
        ((31, 22, 40), 0.339),  # TI2V-5B, 1280x704, 121 frames
    ],
)
def test_the_shares_that_are_stated(grid, share):
    assert RadialAttention().share(grid) == pytest.approx(share, abs=5e-4)
