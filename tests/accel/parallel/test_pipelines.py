"""Whole calls by several ranks: the video of one rank, in every combination."""

import numpy as np
import pytest
import torch

from tests.accel.parallel.ranks import on_ranks
from tests.builders import SMALL, random_i2v_pipeline, random_pipeline, random_ti2v_pipeline
from wan22.accel.parallel import parallelize

BOUND = 1e-5
LAYOUTS = {2: [{"cfg": 2}, {"ulysses": 2}, {"ring": 2}], 4: [{"cfg": 2, "ring": 2}, {"cfg": 2, "ulysses": 2}]}


def off(found, expected):
    """Return the L2 norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def calls(rank, layouts):
    """How far frames are off those of one rank, by pipeline and layout; and a seed that nobody gave."""
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    shown = random_pipeline()
    shown.set_progress_bar_config(disable=False)
    for name, pipe, arguments in (
        ("t2v", shown, {}),
        ("i2v", random_i2v_pipeline(), {"image": image}),
        ("ti2v", random_ti2v_pipeline(), {"image": image}),
    ):
        arguments |= SMALL | {"prompt": "a red kite", "height": 96, "width": 32}
        arguments |= {"guidance_scale_2": None} if name == "ti2v" else {}
        alone = pipe(**arguments, seed=1).frames
        for layout in layouts:
            for vae in (False, True):
                parallel = parallelize(pipe, **layout, vae=vae)
                assert parallel.first == (rank == 0)
                assert bool(pipe.progress_bar(total=1).disable) == (rank > 0 or name != "t2v")
                frames = pipe(**arguments, seed=1).frames
                found[name, str(layout), vae] = off(frames, alone)
                parallel.detach()
        parallel = parallelize(pipe)
        found[name, "seed"] = pipe(**arguments).recipe.seeds
        unguided = pipe(**arguments | {"guidance_scale": 1.0}, seed=1).frames
        parallel.detach()
        found[name, "unguided"] = off(unguided, pipe(**arguments | {"guidance_scale": 1.0}, seed=1).frames)
        found[name, "detached"] = off(pipe(**arguments, seed=1).frames, alone)
    return found


@pytest.mark.parametrize("count", LAYOUTS)
def test_a_call(count):
    first, *others = on_ranks(count, calls, LAYOUTS[count])
    assert len(first) == 3 * (2 * len(LAYOUTS[count]) + 3)
    for found in (first, *others):
        wrong = {case: v for case, v in found.items() if case[1] != "seed" and not v <= BOUND}
        assert not wrong
        assert all(found[name, "detached"] == 0 for name in ("t2v", "i2v", "ti2v"))
        assert all(found[case] == first[case] for case in found if case[1] == "seed"), "one noise for all"
