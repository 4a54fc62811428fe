"""A schedule in which the size changes, by several ranks: the video of one rank."""

import torch

from tests.accel.parallel.ranks import on_ranks
from tests.builders import SMALL, random_i2v_pipeline, random_pipeline
from tests.golden_data import relative_error
from wan22 import EasyCache
from wan22.accel.parallel import parallelize

BOUND = 1e-5


def calls(rank):
    image = torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, pipe, given in (
        ("t2v", random_pipeline(), {"cache": EasyCache(0.3, warmup=0)}),
        ("i2v", random_i2v_pipeline(), {"image": image}),
    ):
        call = SMALL | {
            "prompt": "a red kite",
            "height": 96,
            "width": 64,
            "num_inference_steps": 8,
            "seed": 1,
        }
        call |= given | {"resolution_schedule": [(0.5, 0.5)], "output_type": "latent"}
        alone = pipe(**call).frames
        for layout in ({"cfg": 2}, {"ulysses": 2}, {"ring": 2}):
            parallel = parallelize(pipe, **layout, vae=name == "i2v")
            found[name, str(layout)] = relative_error(pipe(**call).frames, alone)
            parallel.detach()
    return found


def test_ranks_change_the_size_together():
    for found in on_ranks(2, calls):
        assert len(found) == 6 and max(found.values()) <= BOUND, found
