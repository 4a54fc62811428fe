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
        if parallel.layout.shares_tokens:
            with pytest.raises(ValueError, match=r"measure before parallelize\(\)"):
                pipe.calibrate_cache("a", **SMALL | CALL, seed=1)
        else:
            found[str(layout), "ratios"] = pipe.calibrate_cache("a", **SMALL | CALL, seed=1)
        parallel.detach()
    return found


def test_a_call():
    first, other = on_ranks(2, calls)
    for found in (first, other):
        cases = {case: result for case, result in found.items() if case[1] != "ratios"}
        assert len(cases) == 9 and all(error <= BOUND and same for error, same in cases.values())
    assert all(first[case] == other[case] for case in first if case[1] == "ratios")


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
