"""The causal layers' memory: what it holds, and how streams of frames are cut."""

import pytest
import torch
from torch import nn

from tests.fake_card import FakeCard
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


def test_whether_histories_come_out_as_they_went_in():
    cache = TemporalCache()

    def unit(x, cache):
        cache.exchange("a", x, 2)
        cache.exchange("b", x[:, :, :1] * 0, 1)
        return x

    found = []
    for start, repeats in ((0, False), (0, True), (0, True), (0, True), (2, False), (2, True), (2, True)):
        x, *state = cache.run(unit, _frames(start, start + 2), repeats)
        assert x.flatten().tolist() == [start, start + 1]
        found.append(tuple(state))
    # The second layer's input repeats one chunk after the first one's history did, and then its result.
    moved, settled, still = (False, False), (True, False), (True, True)
    assert found == [moved, moved, settled, still, moved, moved, settled]
    assert cache.run(lambda x, cache: x, x, True)[1:] == still
    assert cache.run(lambda x, cache: x, x, False)[1:] == settled
    unit(x, cache)
    assert cache.run(unit, x, True)[1:] == moved, "nobody knows whether that chunk repeated"


def test_the_strips_of_a_chunk_settle_together():
    cache, frame = TemporalCache(), _frames(0, 2).expand(1, 1, 2, 4, 1)

    def stage(x, cache):
        for rows in cache.in_strips([(0, 1), (1, 4)]):
            cache.exchange("a", x[:, :, :, rows], 2)
            cache.exchange("b", x[:, :, :, rows], 2)
        return x

    found = [cache.run(stage, frame, repeats)[1:] for repeats in (False, True, True, True)]
    assert found == [(False, False), (False, False), (True, False), (True, True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_a_device_is_not_asked_whether_memory_repeats():
    with FakeCard() as card:
        zeros, settled = torch.zeros(1, 3, 1, 2, 2, device="cuda"), SettledPrefix()
        assert not settled.repeats(zeros.expand(-1, -1, 4, -1, -1))
        assert settled.repeats(zeros.expand(-1, -1, 4, -1, -1))
        assert not settled.repeats(zeros.expand(-1, -1, 3, -1, -1))
        assert not card.recorded
        assert settled.repeats(torch.zeros(1, 3, 3, 2, 2, device="cuda"))
        assert [wait.kind for wait in card.recorded] == ["compares"]
        piece = torch.zeros(1, 3, 3, 2, 2, device="cuda")
        assert not settled.repeats(piece + 1)
        assert not settled.repeats(piece)
        piece.add_(0)
        assert not settled.repeats(piece), "it was written to"


def test_strips_have_histories_of_their_own():
    cache, frame = TemporalCache(), _frames(0, 2).expand(1, 1, 2, 4, 1)
    for chunk in range(3):
        for strip, rows in enumerate(cache.in_strips([(0, 1), (1, 4)])):
            past = cache.exchange("a", frame[:, :, :, rows] + 10 * strip + chunk, 1)
            assert past is None if chunk == 0 else past.shape[3] == (1, 3)[strip]
            assert chunk == 0 or (past == 10 * strip + chunk).all()
    assert cache.rows is None
    cache.close()
    assert cache.exchange("a", frame, 1) is None


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
