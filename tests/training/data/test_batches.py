"""The batches of an epoch: one shape each, repeats, an order that seed and epoch alone decide."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan22.training.data.batches import batches_of_epoch
from wan22.training.data.cached import CachedClips, CachedItem

# Of the clips below, with seed and epoch 0 and 0, 0 and 1, 1 and 0.
ORDERS = [[[3, 1], [4], [2, 0], [2]], [[2], [4], [1, 3], [2, 0]], [[2], [4], [0, 2], [3, 1]]]
SHAPES = [(16, 1, 8, 8), (16, 2, 8, 8), (16, 2, 8, 12)]


def clips_of(items):
    """Return clips by the numbers of their shapes and their repeats."""
    found = [
        CachedItem(Path(f"folder/clip{i}.safetensors"), SHAPES[shape], repeats, "a", f"clip{i}")
        for i, (shape, repeats) in enumerate(items)
    ]
    return CachedClips(Path("folder"), {}, found, torch.zeros(1, 4))


clips = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(clips, st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 100))
def test_batches(items, size, seed, epoch):
    found = clips_of(items)
    batches = batches_of_epoch(found, size, seed, epoch)
    assert batches == batches_of_epoch(found, size, seed, epoch)
    assert Counter(i for batch in batches for i in batch) == {i: r for i, (_, r) in enumerate(items)}
    for batch in batches:
        assert 1 <= len(batch) <= size and len({found.items[i].shape for i in batch}) == 1
    counts = Counter()
    for shape, repeats in items:
        counts[shape] += repeats
    assert len(batches) == sum(-(-n // size) for n in counts.values())
    whole = sum(n // size for n in counts.values())
    if whole:
        full = batches_of_epoch(found, size, seed, epoch, drop_last=True)
        assert len(full) == whole and full == [batch for batch in batches if len(batch) == size]
    else:
        with pytest.raises(ValueError, match=f"batch_size={size} leaves no batch with drop_last"):
            batches_of_epoch(found, size, seed, epoch, drop_last=True)


def test_the_order_is_the_same_everywhere():
    """It has been written down: another one would end every resumed training differently."""
    found = clips_of([(0, 1), (1, 1), (0, 2), (1, 1), (2, 1)])
    assert batches_of_epoch(found, 2, 0, 0) == ORDERS[0]
    assert batches_of_epoch(found, 2, 0, 1) == ORDERS[1]
    assert batches_of_epoch(found, 2, 1, 0) == ORDERS[2]


def test_where_the_folder_lies_does_not_matter():
    here = clips_of([(i % 3, 1) for i in range(9)])
    moved = [CachedItem(Path("/other") / i.file.name, i.shape, i.repeats, "b", "") for i in here.items]
    there = CachedClips(Path("/other"), {}, moved, torch.zeros(1, 4))
    assert batches_of_epoch(here, 2, 3, 4) == batches_of_epoch(there, 2, 3, 4)


def test_epochs_differ_and_every_clip_comes_at_every_place():
    found = clips_of([(0, 1)] * 6)
    firsts = Counter(batches_of_epoch(found, 1, 0, epoch)[0][0] for epoch in range(600))
    assert set(firsts) == set(range(6)) and min(firsts.values()) > 60


def test_a_batch_has_a_clip_twice_only_where_it_must():
    found = clips_of([(0, 3)] * 4)
    for epoch in range(50):
        assert all(len(set(batch)) == 4 for batch in batches_of_epoch(found, 4, 0, epoch))


def test_a_size_that_is_none():
    with pytest.raises(ValueError, match="batch_size=0 must be an int, at least 1"):
        batches_of_epoch(clips_of([(0, 1)]), 0, 0, 0)
