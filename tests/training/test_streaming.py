"""Blocks that are streamed compute, and give gradients, as those on the device: to the bit."""

import gc
import weakref

import pytest
import torch

from tests.fake_card import FakeCard
from tests.training.conftest import settings
from wan22.accel.offload.layout import blocks_of
from wan22.training.loop import Training
from wan22.training.samples import Drawing
from wan22.training.streaming import StreamedBlocks

pytestmark = pytest.mark.usefixtures("encoded")

SIGMA = torch.tensor([0.9, 0.95], dtype=torch.float64)


def gradients_of(training):
    (trainee,) = training.trainees
    losses = trainee.losses_of(training.base.clips, Drawing(0), [0, 1], [0, 1], SIGMA)
    losses.mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in trainee.trained.items()}
    trainee.optimizer.zero_grad(set_to_none=True)
    return losses.detach(), found


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("streamed", [range(6), [0, 2, 5], [3]])
def test_gradients_are_those_of_a_model_on_the_device(streamed, quantize, tmp_path):
    training = Training(settings(tmp_path, expert="high", quantize=quantize))
    losses, expected = gradients_of(training)
    model = training.trainees[0].model
    before = [p.data_ptr() for p in model.parameters()]
    blocks = StreamedBlocks(model, torch.device("cpu"), streamed)
    for _ in range(2):
        again, found = gradients_of(training)
        assert torch.equal(again, losses)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    blocks.place(torch.device("cpu"))
    assert [p.data_ptr() for p in model.parameters()] == before


def test_few_blocks_are_on_the_device_at_once(tmp_path, monkeypatch):
    training = Training(settings(tmp_path, expert="high"))
    model, alive, most = training.trainees[0].model, [], []
    streaming = StreamedBlocks(model, torch.device("cpu"), range(6))
    copied = streaming._copied

    def counted(index):
        gc.collect()
        weights, ready = copied(index)
        alive.append(weakref.ref(weights[0].untyped_storage()))
        alive[:] = [reference for reference in alive if reference() is not None]
        most.append(len(alive))
        return weights, ready

    monkeypatch.setattr(streaming, "_copied", counted)
    gradients_of(training)
    most.clear()
    gradients_of(training)
    assert max(most) <= 3
    # Each block comes once forward and once backward, but the last one stays between the two, and the first
    # one until the next step.
    assert len(most) == 2 * len(blocks_of(model)) - 2


@torch.no_grad()
def test_copies_run_ahead_on_a_card(tmp_path):
    """Forward alone: autograd's engine knows no pretended device."""
    training = Training(settings(tmp_path, expert="high"))
    (trainee,) = training.trainees
    trainee.model.eval()
    given = training.base.clips, Drawing(0), [0, 1], [0, 1], SIGMA
    expected = trainee.losses_of(*given)
    with FakeCard() as card:
        device = torch.device("cuda")
        trainee.stream(device, [0, 2, 3, 5])
        trainee.place(device)
        found = trainee.losses_of(*given)
        assert not card.waits("_enter")
        blocks = blocks_of(trainee.model)
        where = [block.ffn.net[2].base_layer.weight.device.type for block in blocks]
        assert where == ["cpu", "cuda", "cpu", "cpu", "cuda", "cuda"]  # the last one stays bound
        assert blocks[2].ffn.net[2].lora_A.default.weight.device.type == "cuda"
        assert torch.equal(found.cpu(), expected)
        trainee.place(torch.device("cpu"))
        assert all(parameter.device.type == "cpu" for parameter in trainee.model.parameters())
