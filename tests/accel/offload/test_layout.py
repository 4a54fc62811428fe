"""What weights take, to the byte, before they are loaded."""

import pytest
import torch
from torch import nn

from tests.accel.offload.offloaders import LAYERS, ON_DEMAND, make_pipe, models_of, streamed
from tests.builders import random_i2v_pipeline
from wan22.accel.offload.layout import (
    ALIGNMENT,
    GRAIN,
    PackedBlock,
    Placement,
    blocks_of,
    bytes_of,
    device_bytes,
    packed_blocks,
    streamed_blocks,
)


def test_blocks():
    pipe = random_i2v_pipeline(experts=1)
    assert blocks_of(pipe.transformer) == list(pipe.transformer.blocks)
    assert blocks_of(pipe.text_encoder) == list(pipe.text_encoder.encoder.block)
    assert len(blocks_of(pipe.image_encoder)) == 3
    assert blocks_of(pipe.vae) == []  # compiled chunk by chunk, hooks would be in the way


def test_every_weight_is_in_one_group():
    for model in models_of(make_pipe("i2v-2.1")).values():
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        pieces = [tensor for block in packed_blocks(model) for tensor in block.tensors]
        assert {id(owner) for piece in pieces for owner in piece.owners} == tensors.keys()
        assert bytes_of(model) == sum(t.nbytes for t in tensors.values())


def test_tied_weights_count_once():
    encoder = make_pipe().text_encoder
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    size = bytes_of(encoder)
    encoder.encoder.embed_tokens.weight = nn.Parameter(encoder.shared.weight.data)
    assert bytes_of(encoder) == size
    pieces = [tensor for block in packed_blocks(encoder) for tensor in block.tensors]
    assert [len(piece.owners) for piece in pieces].count(2) == 1
    encoder.encoder.embed_tokens.weight = nn.Parameter(encoder.shared.weight.data.clone())
    assert bytes_of(encoder) == size + encoder.shared.weight.nbytes


def test_a_weight_that_a_block_shares_with_the_rest():
    pipe = make_pipe()
    model = pipe.transformer
    model.blocks[3].norm2.weight = model.blocks[1].norm2.weight
    model.blocks[2].norm2.bias = model.condition_embedder.time_embedder.linear_1.bias
    rest, *blocks = packed_blocks(model)
    counts = [len(block.tensors) for block in blocks]
    assert [counts[0] - count for count in counts] == [0, 0, 1, 1, 0]
    assert len(rest.tensors) == len(packed_blocks(make_pipe().transformer)[0].tensors)


@pytest.mark.parametrize("placement", [ON_DEMAND, streamed(), streamed(2, 3), Placement("host")])
def test_nothing_need_be_loaded(placement):
    for name, model in models_of(make_pipe("i2v")).items():
        if placement.kind != "streamed" or name != "vae":
            size, held = device_bytes(model, placement), bytes_of(model)
            model.to("meta")
            model.tie_weights() if hasattr(model, "tie_weights") else None
            assert device_bytes(model, placement) == size
            assert bytes_of(model) == held


def test_a_slab():
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, dtype=torch.float64),
        torch.tensor(2.5),
        torch.randn(4, 3).bfloat16().t(),
        torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        torch.zeros(0),
        torch.ones(1).expand(5),
        torch.randn(8)[::2],
        torch.arange(300, dtype=torch.uint8),
        torch.ones(1, dtype=torch.bool),
    ]
    group = PackedBlock("g")
    pieces = [group.add(tensor) for tensor in tensors]
    assert group.nbytes % GRAIN == 0
    for chunk in (group.nbytes, 300, 7):
        slab = torch.empty(group.nbytes, dtype=torch.uint8)
        for start in range(0, group.nbytes, chunk):
            group.read(slab[start : start + chunk], start)
        for piece, tensor in zip(pieces, tensors, strict=True):
            found = piece.view_in(slab)
            assert torch.equal(found, tensor)
            assert found.dtype == tensor.dtype
            assert not tensor.numel() or (found.data_ptr() - slab.data_ptr()) % ALIGNMENT == 0
    assert pieces[2].view_in(slab).stride() == (1, 3)
    assert pieces[3].view_in(slab).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("placement", "passing"),
    [
        (ON_DEMAND, []),
        (streamed(0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (streamed(2), [0, 1, 2, 3, 5, 6, 7, 8]),
        (streamed(5), [0, 2, 4, 6, 8]),
        (streamed(7), [0, 3, 6]),
        (streamed(7, 3), []),
        (streamed(8), []),
        (streamed(10), []),
    ],
)
def test_blocks_that_stay_are_spread_evenly(placement, passing):
    assert streamed_blocks(placement, 10) == passing


def test_what_cannot_be_placed():
    model = make_pipe().transformer
    with pytest.raises(ValueError, match=f"resident_blocks=6, but model has {LAYERS} blocks"):
        device_bytes(model, streamed(LAYERS + 1))
    with pytest.raises(ValueError, match="has no blocks to stream; place it on demand"):
        device_bytes(make_pipe().vae, streamed())
    kinds = "'resident', 'on_demand', 'streamed', 'host'"
    with pytest.raises(ValueError, match=f"kind='gone' must be one of {kinds}"):
        Placement("gone")
    with pytest.raises(ValueError, match="source='disk' must be one of 'mmap', 'pinned'"):
        Placement("on_demand", source="disk")
    with pytest.raises(ValueError, match="buffers=4 must be an int, 2 to 3"):
        streamed(buffers=4)
    with pytest.raises(ValueError, match="resident_blocks=-1 must be an int, at least 0"):
        streamed(-1)
    with pytest.raises(ValueError, match="resident_blocks=2 is for streamed models, not on_demand"):
        Placement("on_demand", resident_blocks=2)


def test_weights_of_other_classes_are_refused():
    class Packed(torch.Tensor):
        pass

    model = make_pipe().transformer
    layer = model.blocks[0].attn1.to_q
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(ValueError, match="transformer has weights of class Packed"):
        packed_blocks(model, "transformer")
