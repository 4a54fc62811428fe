"""Sparse self-attention of several ranks: the video of one, or refused where keys pass by."""

import pytest
import torch

from tests.accel.parallel.ranks import on_ranks
from tests.builders import SMALL, random_pipeline
from tests.golden_data import relative_error
from wan22 import RadialAttention
from wan22.accel.parallel import parallelize

SPARSE = RadialAttention(0.1, block=2, dense_steps=0)
# 40 tokens, and 15, which two ranks do not have equally many of.
SIZES = {"even": {"height": 32, "width": 64}, "odd": {"height": 16, "width": 48}}
LAYOUTS = ({"ulysses": 2}, {"cfg": 2}, {"ulysses": 2, "fsdp": True})
BOUND = 1e-5


def latents(pipe, size, attention=SPARSE):
    call = {**SMALL, **SIZES[size], "num_frames": 17, "seed": 1, "output_type": "latent"}
    return pipe("a", **call, attention=attention).frames


def calls(rank):
    found, pipe = {}, random_pipeline()
    alone = {size: latents(pipe, size) for size in SIZES}
    for size in SIZES:
        found["sparse", size] = not torch.equal(alone[size], latents(pipe, size, None))
    for layout in LAYOUTS:
        parallel = parallelize(pipe, **layout, vae=False)
        for size in SIZES:
            found[str(layout), size] = relative_error(latents(pipe, size), alone[size])
        parallel.detach()
    pipe.compile(backend="eager")
    parallel = parallelize(pipe, ulysses=2, vae=False)
    found["compiled", "odd"] = relative_error(latents(pipe, "odd"), alone["odd"])
    parallel.detach()
    pipe.uncompile()
    parallel = parallelize(pipe, ring=2, vae=False)
    with pytest.raises(ValueError, match="ring=2 has them pass by; share heads by ulysses="):
        latents(pipe, "even")
    text = torch.zeros(1, 7, pipe.transformer.config.text_dim)
    with pytest.raises(ValueError, match="ring=2 has them pass by; share heads: ulysses="), torch.no_grad():
        pipe.transformer(torch.zeros(1, 16, 5, 4, 8), torch.zeros(1), text, self_attention=SPARSE)
    parallel.detach()
    found["detached", "even"] = float(not torch.equal(latents(pipe, "even"), alone["even"]))
    return found


def test_a_call():
    for found in on_ranks(2, calls):
        assert found.pop(("sparse", "even")), "some are left out"
        found.pop(("sparse", "odd"))
        assert len(found) == 2 * len(LAYOUTS) + 2
        assert all(error <= BOUND for error in found.values()), found
