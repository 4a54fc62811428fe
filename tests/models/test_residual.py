"""What the blocks add to the tokens: returned beside the velocity, and taken in their place."""

import pytest
import torch

from tests.bench.traffic import on_gpu
from tests.builders import random_transformer
from tests.golden_data import relative_error
from wan22.accel.compile import Compiled

WAYS = ["plain", "in turn", "pending", "in turn and pending", "chunks", "compiled", "half"]


def arguments(model, times=1, batch=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.config.in_channels, 2, 4, 6, generator=generator)
    timestep = 1000 * torch.rand(batch, times, generator=generator)
    return x, timestep, torch.randn(batch, 5, model.config.text_dim, generator=generator)


def prepared(way):
    torch._dynamo.reset()
    model = random_transformer(0)
    model = type(model)(**{n: v for n, v in model.config.items() if n[0] != "_"}).eval()
    model.load_state_dict(random_transformer(0).state_dict())
    if "in turn" in way:
        model.set_samples_in_turn()
    if way == "chunks":
        model.set_token_chunks(3)
    if way == "compiled":
        Compiled([model], backend="eager")
    return model.to(torch.bfloat16) if way == "half" else model


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_the_blocks_add(way, times):
    model = prepared(way)
    x, timestep, text = arguments(model, times)
    text = text.to(model.dtype)
    given, ran, left = [], [], []
    first = model.blocks[0].register_forward_pre_hook(lambda block, args: given.append(args[0]))
    last = model.blocks[-1].register_forward_hook(lambda block, args, out: left.append(out))
    plain = model(x, timestep, text, return_dict=False)
    expected = torch.cat(left) - torch.cat(given)
    first.remove()  # with hooks, no update is left pending
    last.remove()
    with on_gpu() if "pending" in way else torch.no_grad():
        velocity, residual = model(x, timestep, text, return_dict=False, return_residual=True)
    assert len(plain) == 1 and torch.equal(velocity, plain[0])
    assert residual.dtype == torch.float32 and relative_error(residual, expected) < 1e-6
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: ran.append(1))
    (found,) = model(x, timestep, text, residual=residual, return_dict=False)
    assert relative_error(found, velocity) < 1e-5 and not ran
    (half,) = model(x, timestep, text, residual=residual.bfloat16(), return_dict=False)
    assert half.dtype == velocity.dtype and relative_error(half, velocity) < 1e-2
    (other,) = model(x, timestep, text, residual=0.5 * residual, return_dict=False)
    assert relative_error(other, velocity) > 1e-2
