"""Noise levels: their distribution against plain draws, ranges, strata, and that each is its number's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan22.training.draws import generator, noise_like, permuted, uniform
from wan22.training.timesteps import SAMPLINGS, Timesteps

N = 4096


def plain(sampling, shift, mean, std, count=400_000):
    """Draw noise levels as trainers write it, without quantiles."""
    random = torch.Generator().manual_seed(1)
    normal = torch.randn(count, generator=random, dtype=torch.float64)
    if sampling == "logit-normal":
        return torch.sigmoid(mean + std * normal)
    base = torch.rand(count, generator=random, dtype=torch.float64)
    base = base if sampling == "uniform" else torch.sigmoid(std * normal)
    return shift * base / (1 + (shift - 1) * base)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("span", [(0, 1), (0, 0.875), (0.875, 1)])
def test_it_is_the_distribution_of_plain_draws_that_fall_into_the_range(sampling, span):
    found = Timesteps(sampling, 5.0, 0.4, 1.2, *span).sample(0, range(N))
    expected = plain(sampling, 5.0, 0.4, 1.2)
    expected = expected[(expected >= span[0]) & (expected < span[1])]
    assert span[0] <= found.min() and found.max() <= span[1]
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(found.quantile(shares), expected.quantile(shares), rtol=0, atol=6e-3)


def test_a_shift_moves_the_median_as_the_schedule_does():
    assert Timesteps(shift=12.0).quantile(torch.tensor([0.5])).item() == pytest.approx(12 / 13, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SAMPLINGS), st.floats(0.1, 20), st.floats(-2, 2), st.floats(0.2, 3), st.floats(0.01, 0.99)
)
def test_shares_and_levels_are_inverse(sampling, shift, mean, std, share):
    timesteps = Timesteps(sampling, shift, mean, std)
    sigma = timesteps.quantile(torch.tensor([share], dtype=torch.float64))
    assert timesteps.share_below(sigma).item() == pytest.approx(share, abs=1e-9)


def test_samples_in_a_row_fall_into_different_parts_of_equal_probability():
    timesteps = Timesteps(shift=3.0, low=0.3, high=0.9, strata=8)
    edges = timesteps.within(torch.arange(9) / 8)
    assert edges[0] == 0.3 and edges[-1].item() == pytest.approx(0.9, abs=1e-12)
    for turn in range(5):
        levels = timesteps.sample(7, range(8 * turn, 8 * turn + 8))
        assert (torch.bucketize(levels, edges[1:-1])).sort().values.tolist() == list(range(8))


def test_a_sample_depends_on_its_number_alone():
    timesteps = Timesteps()
    assert torch.equal(timesteps.sample(3, range(20))[7:9], timesteps.sample(3, [7, 8]))
    assert not torch.equal(timesteps.sample(3, [7]), timesteps.sample(4, [7]))
    x = torch.empty(2, 3)
    assert torch.equal(noise_like(x, 1, "noise", 5), noise_like(x, 1, "noise", 5))
    draws = {uniform(seed, p, n) for seed in (0, 1) for p in ("a", "b") for n in range(50)}
    assert len(draws) == 200
    assert sorted(permuted(9, 0, "order", 2)) == list(range(9))
    assert generator(1, "a", 23).initial_seed() != generator(1, "a", 2, 3).initial_seed()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"sampling": "sigmoid"}, "sampling='sigmoid'.*'shift'"),
        ({"shift": 0}, "shift=0.*above 0"),
        ({"std": -1}, "std=-1"),
        ({"low": 0.9, "high": 0.2}, r"low=0.9 must be below high=0.2"),
        ({"high": 1.5}, "high=1.5.*nearest is 1"),
        ({"strata": 0}, "strata=0"),
        ({"mean": math.nan}, "mean=nan"),
    ],
)
def test_what_is_no_distribution_is_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        Timesteps(**settings_)
