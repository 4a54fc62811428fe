"""Tokens part by part: the result of all at once, with half the memory."""

import pytest
import torch

from tests.golden_data import relative_error
from tests.models.test_transformer import SMALL, WITH_IMAGE
from wan22 import WanTransformer3DModel
from wan22.accel.planning.trace import peak_bytes
from wan22.models.transformer import WanTransformerBlock


@pytest.mark.parametrize("chunks", [2, 7, 16, 1000])
@pytest.mark.parametrize("times", [(), (5,), (150,)], ids=["one time", "per frame", "per token"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 5e-7)])
def test_tokens_in_parts_give_the_same(dtype, bound, times, chunks):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**WITH_IMAGE if not times else SMALL).to(dtype).eval()
    x = torch.randn(2, model.in_channels, 5, 12, 10, dtype=dtype)
    timestep, text = 1000 * torch.rand(2, *times), torch.randn(2, 512, 20, dtype=dtype)
    image = None if times else torch.randn(2, 257, 28, dtype=dtype)
    with torch.no_grad():
        whole = model(x, timestep, text, image, return_dict=False)[0]
        model.set_token_chunks(chunks)
        parts = model(x, timestep, text, image, return_dict=False)[0]
    assert relative_error(parts, whole) <= bound


def test_tokens_in_parts_take_half_the_memory():
    tokens = 4096
    with torch.device("meta"):
        block = WanTransformerBlock(5120, 13824, 40, True, 1e-6).bfloat16()
        x, time = torch.empty(1, tokens, 5120), torch.empty(1, 1, 6, 5120)
        text = torch.empty(1, 512, 5120, dtype=torch.bfloat16)
        rotary = (torch.empty(1, tokens, 1, 64), torch.empty(1, tokens, 1, 64))
    block.token_chunks = 16
    unit = tokens * 5120 * torch.bfloat16.itemsize
    assert peak_bytes(block, x, text, time, rotary) < 4.5 * unit


@pytest.mark.parametrize("layer", ["attn1", "attn2", "ffn"])
def test_layers_with_hooks_are_called_with_all_tokens(layer):
    """As a cache of attention, say, expects; and their results count."""
    model = WanTransformer3DModel(**SMALL).eval()
    model.set_token_chunks(4)
    seen = []
    for block in model.blocks:
        hook = lambda module, args, output: seen.append(output.shape[1])  # noqa: E731
        block.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        model(torch.randn(1, 16, 2, 4, 4), torch.tensor([3.0]), torch.randn(1, 512, 20))
    assert seen == [8, 8]
    with pytest.raises(ValueError, match="chunks=0 must be an int, at least 1; the nearest is 1"):
        model.set_token_chunks(0)
