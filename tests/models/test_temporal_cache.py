"""The causal layers' memory: what it holds, and how streams of frames are cut."""

import pytest
import torch
from torch import nn

from wan22.models.autoencoder_layers import CausalConv3d
from wan22.models.temporal_cache import (
    SettledPrefix,
    TemporalCache,
    assign_cache_keys,
    regroup_frames,
    same_bits,
)


def _frames(start, stop):
    return torch.arange(start, stop, dtype=torch.float32).reshape(1, 1, -1, 1, 1)


@pytest.mark.parametrize("sizes", [[5], [1, 4], [1, 1, 1, 1, 1], [2, 3], [3, 1, 1], [4, 1]])
def test_exchange_returns_the_frames_before(sizes):
    cache, seen = TemporalCache(), 0
    assert cache.exchange("layer", _frames(1, 1 + sizes[0]), 2) is None
    seen = sizes[0]
    for size in [*sizes[1:], 1]:
        past = cache.exchange("layer", _frames(seen + 1, seen + 1 + size), 2)
        assert past.flatten().tolist() == [max(seen - 1, 0), seen]
        seen += size


def test_layers_do_not_share_memories_and_a_memory_is_a_copy():
    cache, x = TemporalCache(), _frames(0, 8)
    cache.exchange("a", x, 2)
    assert cache.exchange("b", x, 2) is None
    past = cache.exchange("a", x, 2)
    assert past.untyped_storage().nbytes() == past.nbytes


def test_every_layer_gets_its_own_key():
    model = nn.ModuleList([nn.Sequential(CausalConv3d(1, 1), nn.SiLU()), CausalConv3d(1, 1)])
    assign_cache_keys(model)
    assert [model[0][0].cache_key, model[1].cache_key] == ["0.0", "1"]


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [2, 7], [5, 1, 3], [8, 1]])
def test_regrouping_a_stream(sizes):
    groups = list(regroup_frames(_frames(0, 9).split(sizes, dim=2), 1, 3))
    assert [group.shape[2] for group in groups] == [1, 3, 3, 2]
    assert torch.equal(torch.cat(groups, dim=2), _frames(0, 9))


def test_regrouping_is_lazy():
    taken = []

    def source():
        for start in range(0, 12, 4):
            taken.append(start)
            yield _frames(start, start + 4)

    stream = regroup_frames(source(), 1, 3)
    next(stream), next(stream)
    assert taken == [0]


def test_what_was_exchanged_since_a_snapshot():
    cache = TemporalCache()
    cache.exchange("a", _frames(0, 2), 2)
    cache.exchange("b", _frames(0, 2), 2)
    snapshot = cache.snapshot()
    assert cache.exchanged_since(snapshot) == []
    cache.exchange("b", _frames(2, 4), 2)
    cache.exchange("c", _frames(4, 6), 2)
    pairs = cache.exchanged_since(snapshot)
    assert [now.flatten().tolist() for _, now in pairs] == [[2, 3], [4, 5]]
    assert pairs[0][0].flatten().tolist() == [0, 1]
    assert pairs[1][0] is None


def test_same_bits():
    x = torch.tensor([0.0, 1.0])
    assert same_bits(x, x.clone())
    assert not same_bits(x, torch.tensor([-0.0, 1.0]))
    assert not same_bits(x, x.bfloat16())
    assert not same_bits(x, x[:1])
    assert not same_bits(None, x)
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))


def _unit(name, frames, calls):
    """A layer that adds up its input and the `frames` before it; one that remembers nothing with 0."""

    def unit(x, cache):
        calls.append(name)
        past = cache.exchange(name, x, frames) if frames else None
        return x if past is None else x + past.sum(dim=2, keepdim=True)

    return unit


def test_units_settle_one_after_the_other():
    calls = []
    units = [_unit("a", 1, calls), _unit("b", 0, calls), _unit("c", 2, calls), _unit("d", 0, calls)]
    cache, settled, reference = TemporalCache(), SettledPrefix(), TemporalCache()
    seen = []
    for value in (1, 2, 2, 2, 2, 2, 3, 2, 2):
        x = torch.full((1, 1, 1, 1, 1), float(value))
        calls.clear()
        y = x
        if settled.repeats(x):
            y = settled.run(units, x, cache)
        else:
            for unit in units:
                y = unit(y, cache)
        seen.append("".join(calls))
        expected = x
        for unit in units:
            expected = unit(expected, reference)
        assert torch.equal(y, expected)
    # "a" is seen to have settled at the second 2, "b" with it; "c" remembers two frames and needs two more.
    assert seen == ["abcd", "abcd", "abcd", "cd", "cd", "", "abcd", "abcd", "abcd"]
