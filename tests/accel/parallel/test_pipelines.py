"""Whole calls by several ranks: the video of one rank, in every combination."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.accel.parallel.ranks import on_ranks
from tests.builders import SMALL, random_i2v_pipeline, random_pipeline, random_ti2v_pipeline
from tests.tiers import slow
from wan22.accel.parallel import parallelize
from wan22.guidance import Gated, SkipLayer
from wan22.video.metadata import read_recipe
from wan22.video.result import to_uint8

BOUND = 1e-5
LAYOUTS = {
    2: [{"cfg": 2}, {"ulysses": 2}, {"ring": 2}],
    4: [{"cfg": 2, "ring": 2}, {"cfg": 2, "ulysses": 2}, {"ring": 2, "ulysses": 2}],
}


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
            for vae, fsdp in ((False, False), (True, False), (False, True), (True, True)):
                parallel = parallelize(pipe, **layout, vae=vae, fsdp=fsdp)
                assert parallel.first == (rank == 0) and pipe.parallel is parallel
                assert bool(pipe.progress_bar(total=1).disable) == (rank > 0 or name != "t2v")
                frames = pipe(**arguments, seed=1).frames
                found[name, str(layout), vae, fsdp] = off(frames, alone)
                parallel.detach()
                assert pipe.parallel is None
        parallel = parallelize(pipe)
        found[name, "seed"] = pipe(**arguments).recipe.seeds
        unguided = pipe(**arguments | {"guidance_scale": 1.0}, seed=1).frames
        parallel.detach()
        found[name, "unguided"] = off(unguided, pipe(**arguments | {"guidance_scale": 1.0}, seed=1).frames)
        found[name, "detached"] = off(pipe(**arguments, seed=1).frames, alone)
    return found


@pytest.mark.parametrize("count", [2, *slow([4])])
def test_a_call(count):
    first, *others = on_ranks(count, calls, LAYOUTS[count])
    assert len(first) == 3 * (4 * len(LAYOUTS[count]) + 3)
    for found in (first, *others):
        wrong = {case: v for case, v in found.items() if case[1] != "seed" and not v <= BOUND}
        assert not wrong
        assert all(found[name, "detached"] == 0 for name in ("t2v", "i2v", "ti2v"))
        assert all(found[case] == first[case] for case in found if case[1] == "seed"), "one noise for all"


def guided(rank):
    """How far calls whose steps have one, two and three passes are off those of one rank."""
    pipe, found = random_pipeline(), []
    skipping = SkipLayer(layers=1, start=0, stop=0.5)
    at_1 = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}
    for options in (
        {"guidance": Gated(skipping)},
        {"guidance": skipping, **at_1},
        {"guidance": "nag", **at_1},
    ):
        call = SMALL | {"prompt": "a red kite", "height": 96, "num_inference_steps": 6, "seed": 1} | options
        alone = pipe(**call).frames
        for fsdp in (False, True):
            parallel = parallelize(pipe, cfg=2, fsdp=fsdp)
            found.append(off(pipe(**call).frames, alone))
            parallel.detach()
    return found


def test_passes_of_guidance():
    for found in on_ranks(2, guided):
        assert len(found) == 6 and max(found) <= BOUND


def manners(rank, folder):
    """What the first rank does for all, and what it does not."""
    folder = Path(folder)
    pipe = random_pipeline()
    call = SMALL | {"prompt": "a red kite", "height": 96}
    alone = to_uint8(pipe(**call, seed=1).frames[0])
    for vae in (False, True):
        parallel = parallelize(pipe, cfg=2, vae=vae)
        # Frames of a stream are the first rank's; each rank saves, and one writes.
        frames = list(pipe.stream(**call, seed=1))
        assert len(frames) == (5 if rank == 0 else 0)
        if rank == 0:
            assert np.abs(np.stack(frames).astype(int) - alone).max() <= 1
        written = pipe.stream(**call, seed=1).save(folder / f"stream-{vae}.mp4")
        assert [file.name for file in written] == ([f"stream-{vae}.mp4"] if rank == 0 else [])
        video = pipe(**call, seed=1, preview=folder / f"preview-{rank}-{vae}.png")
        written = video.save(folder / f"video-{vae}.mp4")
        assert [file.name for file in written] == ([f"video-{vae}.mp4"] if rank == 0 else [])
        assert video.recipe.device.endswith(f", 2 ranks: cfg 2{', VAE rows' if vae else ''}")
        assert not video.recipe.changes
        parallel.detach()
    # One is asked to stop: all stop with the same step.
    parallel = parallelize(pipe, ulysses=2)
    stop = {"callback_on_step_end": lambda pipe, i, t, given: pipe.stop() if rank == 1 and i == 0 else None}
    assert pipe(**call, seed=1, **stop).recipe.steps_done == 1
    assert pipe(**call, seed=1).recipe.changes == {}
    with pytest.raises(ValueError, match=r"shared already; call pipe\.parallel\.detach"):
        parallelize(pipe, ring=2)
    pipe.free()
    assert pipe.parallel is None


def test_the_first_rank_speaks_for_all(tmp_path):
    on_ranks(2, manners, str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    videos = [f"{what}-{vae}.mp4" for what in ("stream", "video") for vae in (False, True)]
    assert names == sorted(["preview-0-False.png", "preview-0-True.png", *videos])
    recipe = read_recipe(tmp_path / "video-True.mp4")
    again = random_pipeline().reproduce(recipe)  # on one, with a warning: by rounding
    assert again.frames.shape == (1, 5, 96, 32, 3)
