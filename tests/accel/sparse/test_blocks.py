"""Attention by a mask of blocks: the formula, the short last block, FlexAttention's form of the mask."""

import pytest
import torch
import torch.nn.functional as F

from wan22.accel.sparse import blocks
from wan22.accel.sparse.blocks import block_sparse, by_flex_attention, by_gathering, flex_mask


def inputs(tokens, dtype=torch.float32, batch=2, heads=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, size, generator=generator).to(dtype) for _ in range(3)]


def mask(tokens, block):
    count = -(-tokens // block)
    kept = torch.rand(count, count, generator=torch.Generator().manual_seed(1)) > 0.5
    return kept | torch.eye(count, dtype=torch.bool)


def expected(tensors, kept, block):
    tokens = tensors[0].shape[1]
    allowed = torch.kron(kept.int(), torch.ones(block, block, dtype=torch.int32)).bool()[:tokens, :tokens]
    q, k, v = (x.double().transpose(1, 2) for x in tensors)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("tokens", "block"), [(64, 16), (70, 16), (65, 16), (10, 16), (33, 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_the_formula(tokens, block, dtype, bound):
    tensors, kept = inputs(tokens, dtype), mask(tokens, block)
    found = block_sparse(kept, block)(*tensors)
    assert found.dtype == dtype and found.is_contiguous()
    assert error(found, expected(tensors, kept, block)) <= bound


def test_a_mask_that_keeps_all_is_dense():
    tensors = inputs(70)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)
    found = by_gathering(*tensors, torch.ones(5, 5, dtype=torch.bool), 16)
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "block"), [(64, 16), (70, 16)])
def test_flex_attentions_form_of_the_mask(tokens, block):
    kept = mask(tokens, block)
    found = flex_mask(kept, block, tokens)
    assert torch.equal(found.to_dense()[0, 0].bool(), kept)
    q, k = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    allowed = found.mask_mod(0, 0, q, k)
    assert torch.equal(allowed, torch.kron(kept.int(), torch.ones(block, block))[:tokens, :tokens].bool())
    assert not found.mask_mod(0, 0, q, tokens + torch.arange(-tokens % block)[:, None, None]).any()
    partial = found.kv_num_blocks.sum()
    assert partial == (kept[:, -1].sum() if tokens % block else 0), "the others need no look at single tokens"
    assert flex_mask(kept, block, tokens) is found, "made once"


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "block"), [(256, 64), (300, 64)])
def test_flex_attention_compiled_computes_the_same(tokens, block):
    tensors, kept = inputs(tokens), mask(tokens, block)
    torch.testing.assert_close(
        by_flex_attention(*tensors, kept, block), by_gathering(*tensors, kept, block), rtol=1e-5, atol=1e-5
    )


def test_which_one_computes(monkeypatch):
    """FlexAttention on CUDA, if Triton is there to compile it."""
    chosen = []

    class OnGPU(torch.Tensor):
        is_cuda = True

    def note(name):
        return lambda query, *others: chosen.append(name) or query

    for name in ("by_flex_attention", "by_gathering"):
        monkeypatch.setattr(blocks, name, note(name))
    given = [x.as_subclass(OnGPU) for x in inputs(16)]
    for there in (True, False):
        monkeypatch.setattr(blocks, "has_compiler", lambda there=there: there)
        blocks.attend(*given, torch.ones(1, 1), 16)
    blocks.attend(*inputs(16), torch.ones(1, 1), 16)
    assert chosen == ["by_flex_attention", "by_gathering", "by_gathering"]


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a mask of 4 blocks of 16 tokens is not for 65 tokens"):
        block_sparse(torch.ones(4, 4, dtype=torch.bool), 16)(*inputs(65))


def test_compiled_without_a_graph_break_and_once_for_all_masks():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, given):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda kernel, *t: kernel(*t) + 1, fullgraph=True, backend=backend)
    tensors = inputs(70)
    for seed in range(3):
        kept = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)) > 0.5
        kernel = block_sparse(kept | torch.eye(5, dtype=torch.bool), 16)
        torch.testing.assert_close(compiled(kernel, *tensors), kernel(*tensors) + 1)
    assert len(graphs) == 1
