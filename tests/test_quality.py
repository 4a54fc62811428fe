"""The judge of quality: what it compares, counts and draws, on two videos."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.bench import quality
from wan22 import WanT2VPipeline, tiny_checkpoint


def test_equal_videos_and_others():
    video = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    psnr, ssim, distance = quality.compare(video, video)
    assert (psnr, ssim, distance) == pytest.approx((54.2, 1, 0), abs=0.05)
    near = np.clip(video.astype(int) + 5, 0, 255).astype(np.uint8)
    error = np.mean((near.astype(float) - video) ** 2)
    assert quality.compare(near, video)[0] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert quality.compare(255 - video, video)[2] > 0.5


def test_the_frontier_has_what_nothing_beats():
    rows = [{"fewer": f, "psnr": p} for f, p in ((1.2, 40), (1.5, 45), (2, 30), (2, 35), (3, 20), (2.5, 10))]
    assert [(r["fewer"], r["psnr"]) for r in quality.frontier(rows)] == [(1.5, 45), (2, 35), (3, 20)]


def test_a_run_counts_passes_and_goes_on_where_it_was(tmp_path):
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts, judge = quality.of_the_miniature(2)
    file, names = tmp_path / "rows.json", ["50 % of the steps", "cache=taylor:medium"]
    rows = {r["name"]: r for r in quality.run(pipe, prompts, judge, names, file)}
    assert rows[quality.EXACT]["passes"] == 40 and rows[quality.EXACT]["psnr"] > 50
    assert rows["50 % of the steps"]["fewer"] == 2
    cached = rows["cache=taylor:medium"]
    assert 1.5 < cached["fewer"] < 3 and 20 < cached["psnr"] < 50
    assert set(cached["scores"]) == set(quality.JUDGED)
    kept = json.loads(file.read_text())
    kept["rows"] = [{**r, "psnr": 99.0} if r["name"] == names[0] else r for r in kept["rows"]]
    file.write_text(json.dumps(kept))
    again = {r["name"]: r for r in quality.run(pipe, prompts, judge, names[:1], file)}
    assert again[names[0]]["psnr"] == 99, "what is there is not measured again"
    quality.plot(list(rows.values()), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (960, 600)
    assert quality.table(list(rows.values())).count("\n") == 1 + len(rows)


@pytest.mark.parametrize("name", quality.SETTINGS)
def test_every_setting_is_one_of_a_call(name):
    arguments = set(quality.SETTINGS[name]) - {"steps"}
    assert arguments <= {
        "cache",
        "guidance",
        "guidance_interval",
        "attention",
        "resolution_schedule",
    } or arguments == {"quantize"}


def test_quantised_transformers_are_copies():
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"), dtype=torch.float32)
    before = [pipe.transformer, pipe.transformer_2]
    with quality.quantized(pipe, "int8:low"):
        assert pipe.acceleration.changes()["quantized"].keys() == {"transformer_2"}
    assert [pipe.transformer, pipe.transformer_2] == before and pipe.acceleration.changes() == {}
