"""Self-attention that something else computes: by layer, in every way that the model runs its blocks."""

import copy
from itertools import pairwise

import pytest
import torch

from tests.bench.traffic import on_gpu
from tests.builders import TEXT_DIM, random_transformer
from tests.golden_data import relative_error
from wan22 import RadialAttention
from wan22.models.attention import native
from wan22.models.attention_guidance import AttentionGuidance

# 30 tokens; a mask of blocks of 4 leaves out some.
SPARSE = RadialAttention(0.1, block=4)


@pytest.fixture
def model():
    model = copy.deepcopy(random_transformer(0))
    model.blocks.extend(copy.deepcopy(block) for block in random_transformer(1).blocks)
    return model


@torch.no_grad()
def call(model, self_attention=SPARSE, batch=1, **options):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, 7, TEXT_DIM, generator=generator)
    x = torch.randn(batch, 16, 5, 4, 6, generator=generator)
    times = torch.tensor([900.0, 100.0][:batch])
    return model(x, times, text, return_dict=False, self_attention=self_attention, **options)[0]


def test_it_is_asked_for_each_layer_with_the_grid(model):
    asked, computed = [], []

    class Asking:
        def kernel_of(self, layer, grid, device):
            asked.append((layer, grid, device.type))
            return None if layer == 2 else lambda q, k, v: computed.append(layer) or native(q, k, v)

    assert torch.equal(call(model, Asking()), call(model, None))
    assert asked == [(layer, (5, 2, 3), "cpu") for layer in range(4)]
    assert computed == [0, 1, 3], "in self-attention alone"


def test_nothing_left_out_changes_no_bit(model):
    exact = call(model, None)
    assert torch.equal(call(model, RadialAttention(block=128)), exact)
    assert torch.equal(call(model, RadialAttention(0.1, block=4, dense_layers=4)), exact)
    assert not torch.allclose(call(model), exact, atol=1e-3)


def test_the_first_layers_are_dense(model):
    found = [call(model, RadialAttention(0.1, block=4, dense_layers=layers)) for layers in range(5)]
    assert not any(torch.equal(a, b) for a, b in pairwise(found))


def test_the_layer_follows_the_mask(model):
    """In float64, with a boolean mask of tokens in place of blocks."""
    kernel, layer = SPARSE.kernel_of(1, (5, 2, 3), torch.device("cpu")), model.double().blocks[1].attn1
    allowed = torch.kron(kernel.kept.int(), torch.ones(4, 4, dtype=torch.int32)).bool()[:30, :30]
    torch.manual_seed(0)
    x = torch.randn(2, 30, 48, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (
            e.unflatten(-1, (2, 24)).transpose(1, 2)
            for e in (layer.norm_q(layer.to_q(x)), layer.norm_k(layer.to_k(x)), layer.to_v(x))
        )
        scores = (q @ k.mT / 24**0.5).masked_fill(~allowed, -torch.inf)
        expected = layer.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, instead=kernel), expected)


def test_however_the_model_computes_it(model):
    guided = {"attention_guidance": AttentionGuidance(5.0, 2.5, 0.25), "skip_layers": (2,)}
    guided["encoder_hidden_states_negative"] = torch.ones(2, 7, TEXT_DIM)
    for options in ({}, guided):
        expected = call(model, batch=2, **options)
        model.set_samples_in_turn()
        torch.testing.assert_close(call(model, batch=2, **options), expected)
        with on_gpu():
            torch.testing.assert_close(call(model, batch=2, **options), expected)
        model.set_samples_in_turn(False)
        model.set_token_chunks(3)
        torch.testing.assert_close(call(model, batch=2, **options), expected)
        model.set_token_chunks(1)


def test_other_kernels_compute_what_stays_dense(model):
    expected = call(model)
    model.set_attention_backend("math")
    assert relative_error(call(model), expected) <= 1e-6


def test_residuals_are_those_of_the_blocks(model):
    """What a step cache keeps; and what it supplies runs no attention."""
    with torch.no_grad():
        x, text = torch.randn(1, 16, 5, 4, 6), torch.randn(1, 7, TEXT_DIM)
        given = (x, torch.tensor([500.0]), text)
        options = {"self_attention": SPARSE, "return_dict": False}
        velocity, residual = model(*given, return_residual=True, **options)
        found = model(*given, residual=residual, **options)[0]
        torch.testing.assert_close(found, velocity)


def test_another_processor_refuses_it(model):
    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary=None):
            return hidden_states

    model.blocks[1].attn1.set_processor(Processor())
    call(model, None)
    with pytest.raises(ValueError, match="Processor computes dense self-attention alone"):
        call(model)
