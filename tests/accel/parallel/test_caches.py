"""Step caches of several ranks: one decision, and the video of one rank."""

import pytest
import torch

from tests.accel.parallel.ranks import on_ranks
from tests.builders import SMALL, random_pipeline
from tests.golden_data import relative_error
from tests.pipelines.call.caches.loops import CALL, RATIOS, STEPS
from wan22 import EasyCache, MagCache, TaylorCache
from wan22.accel.parallel import parallelize
from wan22.pipelines.call.caches import easy

CACHES = {
    "easy": EasyCache(threshold=0.3, warmup=0),
    "mag": MagCache(threshold=0.2, warmup=0, ratios=RATIOS),
    "taylor": TaylorCache(interval=3, warmup=0),
}
BOUND = 1e-5
# Of nine tokens, one rank has five, the other four and padding.
UNEVEN = SMALL | CALL | {"height": 48, "width": 48, "num_frames": 1}


def videos(pipe, **changes):
    call = SMALL | CALL | {"prompt": ["a red kite", "b"], "height": 96, "seed": 1, "output_type": "latent"}
    return {name: pipe(**call | changes, cache=cache) for name, cache in CACHES.items()}


def calls(rank):
    found, pipe = {}, random_pipeline()
    alone = videos(pipe)
    for layout in ({"cfg": 2}, {"ulysses": 2}, {"cfg": 2, "fsdp": True}):
        parallel = parallelize(pipe, **layout, vae=False)
        for name, video in videos(pipe).items():
            error = relative_error(video.frames, alone[name].frames)
            found[str(layout), name] = error, video.recipe.passes == alone[name].recipe.passes
        found[str(layout), "ratios"] = pipe.calibrate_cache("a", **UNEVEN, seed=1)
        parallel.detach()
    found["alone", "ratios"] = pipe.calibrate_cache("a", **UNEVEN, seed=1)
    return found


def test_a_call():
    first, other = on_ranks(2, calls)
    for found in (first, other):
        cases = {case: result for case, result in found.items() if case[1] != "ratios"}
        assert len(cases) == 9 and all(error <= BOUND and same for error, same in cases.values())
    measured = [case for case in first if case[1] == "ratios"]
    assert len(measured) == 4 and all(first[case] == other[case] for case in measured)
    alone = first["alone", "ratios"].ratios
    assert alone["transformer"][1] != 1.0
    for case in measured:
        for slot, ratios in first[case].ratios.items():
            assert ratios == pytest.approx(alone[slot], rel=3e-6)


def disagreeing(rank):
    """One rank sees larger changes than the other, and passes come and go."""
    mean, scales = easy._mean, [3.0 if i % 4 in (0, 1) else 1.0 for i in range(STEPS)]
    easy._mean = lambda x: mean(x) + 0.1 * rank
    changes = {"guidance_scale": scales, "guidance_scale_2": None}
    try:
        pipe = random_pipeline()
        parallelize(pipe, cfg=2, vae=False)
        return {name: (video.frames, video.recipe.passes) for name, video in videos(pipe, **changes).items()}
    finally:
        easy._mean = mean


def test_ranks_that_would_decide_differently_compute():
    first, other = on_ranks(2, disagreeing)
    for name in CACHES:
        assert first[name][1] == other[name][1]
        assert torch.equal(first[name][0], other[name][0])
        assert any(computed < of for computed, of in first[name][1])
