"""Plans of a training's memory: what is counted, and which blocks are streamed within a budget."""

from dataclasses import replace

import pytest
import torch

from tests.training.conftest import settings
from wan22 import WanTransformer3DModel
from wan22.accel.offload.layout import blocks_of, bytes_of
from wan22.accel.planning.meta_models import store_as
from wan22.checkpoints.loading.fill import empty_weights
from wan22.training.adapters import attach
from wan22.training.loop import Training
from wan22.training.planning import AT_ONCE, activation_bytes, plan_training

pytestmark = pytest.mark.usefixtures("encoded")

SHAPE, WIDTH = (16, 21, 60, 104), 4096


@pytest.fixture(scope="module")
def a14b():
    """Return an expert of the released size without weights, its LoRA, and the settings."""
    config = settings("out", rank=32, batch_size=1)
    with empty_weights():
        model = WanTransformer3DModel()
    store_as(model, torch.bfloat16)
    trained = attach(model, config)
    model.enable_gradient_checkpointing()
    return model, trained, config


def test_all_on_the_device(a14b):
    model, trained, config = a14b
    plan = plan_training(model, trained, config, SHAPE, WIDTH)
    lora = sum(p.nbytes for p in trained.values())
    # Ten matrices' pairs of rank 32 in each of 40 blocks, float32: q, k, v, o twice, and the feed-forward.
    assert lora == 4 * 32 * 40 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    assert plan.frozen == bytes_of(model) - lora and plan.trained == 5 * lora
    assert plan.streamed == ()
    assert f"{plan.peak / 1e9:.2f} GB" in str(plan)


def test_a_budget_streams_as_few_blocks_as_it_can(a14b):
    model, trained, config = a14b
    whole = plan_training(model, trained, config, SHAPE, WIDTH)
    block = sum(p.nbytes for p in blocks_of(model)[0].parameters() if not p.requires_grad)
    budget = whole.peak - 10 * block
    plan = plan_training(model, trained, config, SHAPE, WIDTH, budget)
    assert len(plan.streamed) == 10 + AT_ONCE and plan.peak <= budget < plan.peak + block
    assert plan.frozen == whole.frozen - 10 * block
    gaps = {b - a for a, b in zip(plan.streamed, plan.streamed[1:], strict=False)}
    assert gaps <= {3, 4}, "evenly over all blocks"
    with pytest.raises(
        ValueError, match=r"memory=3 GB is too little: with all blocks streamed it takes .*40"
    ):
        plan_training(model, trained, config, SHAPE, WIDTH, 3 * 10**9)
    with pytest.raises(ValueError, match="with checkpointing, blocks can be streamed"):
        plan_training(model, trained, replace(config, checkpointing=False), SHAPE, WIDTH, budget)


def test_checkpointing_keeps_the_tokens_of_each_block_alone(a14b):
    """Beyond one block's own activations: float32 tokens "b l d" for each."""
    model, trained, config = a14b
    tokens = 21 * 30 * 52
    most = activation_bytes(model, trained, config, SHAPE, WIDTH)
    assert 40 * tokens * 5120 * 4 < most < 1.5 * 40 * tokens * 5120 * 4
    twice = activation_bytes(model, trained, replace(config, batch_size=2), SHAPE, WIDTH)
    assert 1.7 * most < twice < 2.1 * most


def test_a_budget_is_a_gpu_s(tmp_path):
    with pytest.raises(ValueError, match="memory='8GB' is a GPU's; cpu has the host's"):
        Training(settings(tmp_path, memory="8GB"))
