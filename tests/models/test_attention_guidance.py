"""Attention that keeps away from a negative text, and layers that are skipped."""

import copy

import pytest
import torch

from tests.bench.traffic import on_gpu
from tests.builders import TEXT_DIM, random_transformer
from wan22.models.attention_guidance import AttentionGuidance

NAG = AttentionGuidance(5.0, 2.5, 0.25)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = copy.deepcopy(random_transformer(0))
    model.blocks.extend(copy.deepcopy(block) for block in random_transformer(1).blocks)
    return model


@torch.no_grad()
def call(model, guidance=NAG, batch=1, **options):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(batch, 7, TEXT_DIM, generator=generator) for _ in range(2)]
    if guidance is not None:
        options |= {"encoder_hidden_states_negative": texts[1], "attention_guidance": guidance}
    x = torch.randn(batch, 16, 2, 4, 6, generator=generator)
    times = torch.tensor([900.0, 100.0][:batch])
    return model(x, times, texts[0], return_dict=False, **options)[0]


def by_hand(layer, x, positive, negative, guidance):
    """The paper's equations, head by head, in float64."""
    layer, (x, positive, negative) = (
        copy.deepcopy(layer).double(),
        (e.double() for e in (x, positive, negative)),
    )
    n = layer.heads

    def attended(text):
        q, k, v = layer.norm_q(layer.to_q(x)), layer.norm_k(layer.to_k(text)), layer.to_v(text)
        q, k, v = (e.unflatten(-1, (n, -1)) for e in (q, k, v))
        heads = []
        for i in range(n):
            scores = q[:, :, i] @ k[:, :, i].transpose(1, 2) / q.shape[-1] ** 0.5
            heads.append(scores.softmax(-1) @ v[:, :, i])
        return torch.cat(heads, -1)

    plus, minus = attended(positive), attended(negative)
    z = guidance.scale * plus - (guidance.scale - 1) * minus
    ratio = torch.linalg.vector_norm(z, 1, -1, keepdim=True) / torch.linalg.vector_norm(
        plus, 1, -1, keepdim=True
    )
    limited = torch.where(ratio > guidance.tau, z * guidance.tau / ratio, z)
    return layer.to_out[0](guidance.alpha * limited + (1 - guidance.alpha) * plus), ratio


@pytest.mark.parametrize("tau", [2.5, 4.8, 100.0])
@torch.no_grad()
def test_the_layer_follows_the_formula(tau):
    layer = random_transformer(0).blocks[0].attn2
    torch.manual_seed(0)
    x, positive, negative = (torch.randn(2, length, 48) for length in (11, 7, 7))
    guidance = AttentionGuidance(4.0, tau, 0.4)
    expected, ratio = by_hand(layer, x, positive, negative, guidance)
    assert (ratio > tau).any() == (tau < 100) and (ratio < tau).any() == (tau > 2.5), "none, some, or all"
    found = layer(x, torch.cat((positive, negative)), guidance=guidance)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_scale_of_1_is_plain(model):
    plain = call(model, None)
    torch.testing.assert_close(call(model, AttentionGuidance(1.0, 2.5, 0.7)), plain)
    assert not torch.allclose(call(model), plain, atol=1e-3)


def test_a_result_of_zero_stays_finite():
    nothing = torch.zeros(1, 2, 2, 4)
    assert torch.equal(NAG(nothing, nothing), nothing)


def test_however_the_model_computes_it(model):
    expected = call(model, batch=2, skip_layers=(2,))
    model.set_samples_in_turn()
    torch.testing.assert_close(call(model, batch=2, skip_layers=(2,)), expected)
    with on_gpu():
        torch.testing.assert_close(call(model, batch=2, skip_layers=(2,)), expected)
    model.set_samples_in_turn(False)
    model.set_token_chunks(3)
    torch.testing.assert_close(call(model, batch=2, skip_layers=(2,)), expected)


@pytest.mark.parametrize("skipped", [(1,), (0, 2), (3,)])
@pytest.mark.parametrize("guidance", [None, NAG], ids=["plain", "nag"])
def test_skipped_layers_are_not_there(model, skipped, guidance):
    found = call(model, guidance, skip_layers=skipped)
    assert not torch.equal(found, call(model, guidance))
    for index in reversed(skipped):
        del model.blocks[index]
    assert torch.equal(found, call(model, guidance))


def test_image_tokens_are_attended_to_as_before():
    """Those with projections of their own are added; those without are context of both texts."""
    torch.manual_seed(0)
    with_own = random_transformer(7, 16, 20, image_dim=24, added_kv_proj_dim=48).blocks[0].attn2
    without = random_transformer(0).blocks[0].attn2
    x, image, positive = (torch.randn(1, length, 48) for length in (11, 5, 7))
    same = AttentionGuidance(3.0, 2.5, 1.0)
    for layer in (with_own, without):
        with torch.no_grad():
            found = layer(x, torch.cat((positive, positive)), image, guidance=same)
            torch.testing.assert_close(found, layer(x, positive, image))


def test_another_processor_refuses_it(model):
    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary=None):
            return hidden_states

    model.blocks[0].attn2.set_processor(Processor())
    call(model, None)
    with pytest.raises(ValueError, match="Processor cannot keep attention away from a text"):
        call(model)
