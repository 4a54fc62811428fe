"""Bounds on the bytes and kernels of a transformer's block at its real size, and on the times that follow."""

import json
import sys

import pytest
import torch

from tests.bench import account
from tests.bench.account import VIDEOS, compiled, eager
from tests.bench.traffic import fake_gpu, fused_peak

A14B_480P, A14B_720P, TI2V_5B = VIDEOS
# Gigabytes that the block's kernels read and write, products and attention aside, and their number.
BOUNDS = {
    ("eager", A14B_720P): (63.8, 27),
    ("fused", A14B_720P): (18.7, 7),
    ("fused", TI2V_5B): (4.07, 7),
}


@pytest.mark.parametrize(("way", "video"), BOUNDS)
def test_bytes_and_kernels_of_a_block(way, video):
    block, _ = eager("wan22", video, fused=way == "fused")
    most, kernels = BOUNDS[way, video]
    assert 0.95 * most <= block.nbytes / 1e9 <= most
    assert block.kernels <= kernels


def test_bytes_and_kernels_of_a_compiled_block():
    block = compiled("wan22", A14B_720P)
    assert 17 <= block.nbytes / 1e9 <= 17.9
    assert block.kernels <= 6


def test_a_forward_without_blocks():
    _, rest = eager("wan22", A14B_720P, fused=True)
    assert rest.nbytes / 1e9 <= 11.5


def test_peak_of_activations():
    """The residual stream twice, an update, its norm, queries, keys, values and what attention returns."""
    with fake_gpu():
        _, call = account.step("wan22", A14B_720P, 2)
        unit = A14B_720P.tokens * 5120 * torch.bfloat16.itemsize
        assert 9 * unit <= fused_peak(call) <= 10.1 * unit


# Gigabytes that a latent frame's kernels read and write beside convolutions.
CHUNKS = {
    (A14B_720P, torch.bfloat16, False): 116.5,
    (A14B_720P, torch.bfloat16, True): 46.6,
    (A14B_720P, torch.float32, True): 93.2,
    (TI2V_5B, torch.bfloat16, True): 38.2,
}


@pytest.mark.parametrize(("video", "dtype", "fused"), CHUNKS)
def test_bytes_of_a_decoded_chunk(video, dtype, fused):
    most = CHUNKS[video, dtype, fused]
    assert 0.9 * most <= account.chunk("wan22", video, dtype, fused).nbytes / 1e9 <= most


@pytest.mark.parametrize(("video", "most"), [(A14B_720P, 1.02), (TI2V_5B, 2.70)])
def test_seconds_of_decoding_a_clip(video, most):
    """Convolutions alone take 0.78 and 2.41 s."""
    traffic = account.chunk("wan22", video, torch.bfloat16, True)
    kernels = video.latent_size[0] * traffic.nbytes / account.BYTE_RATE
    assert 0.9 * most <= account.convolution_seconds(video) + kernels <= most


def test_bare_times_are_those_of_the_profile():
    for video, seconds in ((A14B_720P, 9.43), (A14B_480P, 2.35), (TI2V_5B, 0.724)):
        config = account.released_configs(video.preset)["transformer"]
        assert account.bare_seconds(config, video.tokens) == pytest.approx(seconds, rel=1e-3)


def test_the_table_and_its_file(monkeypatch, capsys, tmp_path):
    traffic = account.Traffic(2_000_000_000, 7)
    monkeypatch.setattr(account, "eager", lambda *args, **options: (traffic, account.Traffic()))
    monkeypatch.setattr(account, "compiled", lambda *args: traffic)
    monkeypatch.setattr(account, "chunk", lambda *args: traffic)
    monkeypatch.setattr(sys, "argv", ["account", "--json", str(tmp_path / "account.json")])
    account.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 + 1 + 16
    assert {line.count("|") for line in lines[:8]} == {11}
    assert "| wan22, fused, Wan2.2-T2V-A14B 1280x720x81 | fp32 | 2.0 | 7 | 0.01 |" in lines
    assert "| 9.451 s | 2.00 | 7 |" in lines[2]
    rows = json.loads((tmp_path / "account.json").read_text())["rows"]
    assert rows[-1]["name"] == "products and attention alone"
    assert rows[0]["seconds"]["1280x720x81"] == pytest.approx(9.4506, abs=1e-3)
