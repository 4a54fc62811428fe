"""Two of the things that make a pipeline faster or smaller at once: the same result, and back to the bit."""

from itertools import combinations

import pytest
import torch

from tests.accel.features import CHANGING, SAME, frames, own, streamed
from tests.checkpoints.lora_writers import make_lora, save
from tests.golden_data import relative_error
from tests.tiers import slow

# What changes the result comes first in each pair, as both are there in what the pair is compared with.
PAIRS = [pair for pair in combinations([*CHANGING, *SAME], 2) if not set(pair) <= set(CHANGING)]
# Compiling takes most of the time.
SLOW = [pair for pair in PAIRS if "compile" in pair and "lora" not in pair]


def check(form, pair, tmp_path):
    torch._dynamo.reset()
    pipe = own(form)
    lora = save(make_lora(pipe.transformer, 1), tmp_path / "lora.safetensors")
    for name in pair:
        if name in CHANGING:
            CHANGING[name](pipe, lora)
    expected = frames(pipe, form)
    same = [name for name in pair if name in SAME]
    for name in same:
        SAME[name][0](pipe)
    assert relative_error(frames(pipe, form), expected) <= 2e-5
    for name in reversed(same):
        SAME[name][1](pipe)
    assert torch.equal(frames(pipe, form), expected)


@pytest.mark.parametrize("pair", [*(p for p in PAIRS if p not in SLOW), *slow(SLOW)], ids="+".join)
def test_pairs(pair, tmp_path):
    check("t2v", pair, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["i2v", "ti2v"])
@pytest.mark.parametrize("name", SAME)
def test_with_a_lora_in_the_other_forms(name, form, tmp_path):
    check(form, ("lora", name), tmp_path)


def test_changes_while_weights_stream(tmp_path):
    """LoRAs and quantised layers that come while a plan is applied are what comes to the device next."""
    pipe, plain = own("t2v"), own("t2v")
    lora = save(make_lora(pipe.transformer, 1), tmp_path / "lora.safetensors")
    streamed(pipe)
    frames(pipe, "t2v")
    for change in CHANGING.values():
        for each in (pipe, plain):
            change(each, lora)
        assert torch.equal(frames(pipe, "t2v"), frames(plain, "t2v"))
