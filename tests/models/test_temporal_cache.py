"""The causal layers' memory: what it holds, and how streams of frames are cut."""

import pytest
import torch
from torch import nn

from wan22.models.autoencoder_layers import CausalConv3d
from wan22.models.temporal_cache import TemporalCache, assign_cache_keys, regroup_frames


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
