"""Values that no trained model has: told from what is read of a file, not from all of it."""

import logging
import math

import pytest
import torch

from tests.checkpoints import writers
from wan22.checkpoints.files.quantized import scaled_tensor
from wan22.checkpoints.loading.values import check_samples

GOOD = {"norm": torch.ones(64), "a": torch.randn(512, 512), "b": torch.randn(4, 4)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", GOOD)
def test_a_weight_that_is_not_finite_is_named(name, value):
    check_samples("the file", GOOD)
    changed = GOOD | {name: torch.full_like(GOOD[name], value)}
    with pytest.raises(ValueError, match=f"^the file: {name} has values that are not finite"):
        check_samples("the file", changed)


def test_a_single_value_of_a_norm(tmp_path):
    norm = torch.ones(64).index_fill(0, torch.tensor([63]), math.nan)
    with pytest.raises(ValueError, match="norm has values"):
        check_samples("the file", GOOD | {"norm": norm})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_values_whose_sum_overflows_pass(dtype):
    check_samples("the file", GOOD | {"norm": torch.full((64,), 3e38, dtype=dtype)})


def test_float8(tmp_path):
    data = torch.full((256, 256), math.nan).to(writers.FP8)
    with pytest.raises(ValueError, match="a has values"):
        check_samples("the file", GOOD | {"a": scaled_tensor(data, torch.ones(()))})


def test_matrices_of_zeros_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        check_samples("the file", GOOD | {"a": torch.zeros(512, 512)})
        assert not caplog.text
        check_samples("the file", {name: torch.zeros_like(weight) for name, weight in GOOD.items()})
    assert "the file: all of its matrices begin with zeros" in caplog.text


def test_weights_without_values_pass():
    check_samples("the file", {name: weight.to("meta") for name, weight in GOOD.items()})
    check_samples("the file", {})
