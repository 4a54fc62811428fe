"""The last update of a block, left to the first kernel of the next where blocks are fused: the same bits."""

import copy

import pytest
import torch

from tests.bench.traffic import on_gpu
from tests.builders import random_transformer
from wan22.accel.compile import Compiled
from wan22.models.transformer import WanTransformerBlock


@pytest.fixture
def model():
    torch._dynamo.reset()
    return copy.deepcopy(random_transformer(0))


def call(model, batch=2):
    generator = torch.Generator().manual_seed(0)
    c, text = model.config.in_channels, model.config.text_dim
    with torch.no_grad():
        return model(
            torch.randn(batch, c, 2, 4, 6, generator=generator),
            torch.tensor([900.0, 100.0][:batch]),
            torch.randn(batch, 5, text, generator=generator),
            return_dict=False,
        )[0]


def left_pending(model, monkeypatch):
    """Return how many of a call's blocks were given what the one before had left."""
    given, inner = [], WanTransformerBlock.forward

    def forward(self, *args):
        given.append(len(args) == 6)
        return inner(self, *args)

    monkeypatch.setattr(WanTransformerBlock, "forward", forward)
    with on_gpu():
        call(model)
    return sum(given)


def test_the_result_is_the_same(model, monkeypatch):
    for in_turn in (False, True):
        model.set_samples_in_turn(in_turn)
        plain = call(model)
        with on_gpu():
            assert torch.equal(call(model), plain)
    assert left_pending(model, monkeypatch) == 2 * len(model.blocks)


def test_elsewhere_nothing_is_left(model, monkeypatch):
    monkeypatch.setattr(WanTransformerBlock, "leaves_updates", property(lambda self: pytest.fail("asked")))
    call(model)


@pytest.mark.parametrize("what", ["hook", "forward", "chunks"])
def test_whoever_sees_a_block_sees_the_whole_stream(model, monkeypatch, what):
    seen, block = [], model.blocks[0]
    if what == "hook":
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    elif what == "forward":
        inner = block.forward
        block.forward = lambda *args: seen.append(inner(*args)) or seen[-1]
    else:
        model.set_token_chunks(2)
    plain = call(model)
    assert left_pending(model, monkeypatch) == 0
    with on_gpu():
        assert torch.equal(call(model), plain)
    assert all(isinstance(output, torch.Tensor) for output in seen)


def test_compiled_blocks_are_one_graph_all_the_same(model):
    plain, graphs = call(model), []
    compiled = Compiled([model], backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with on_gpu():
        torch.testing.assert_close(call(model), plain, rtol=0, atol=2e-6 * float(plain.abs().max()))
    assert len(model.blocks) > 1
    assert len(graphs) == 1
    compiled.detach()
    assert torch.equal(call(model), plain)
