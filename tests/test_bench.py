"""The benchmarks' harness on made-up timings, their arithmetic, and a dry run of what is for GPUs."""

import json

import pytest
import torch

from tests.accel.parallel.ranks import on_ranks
from tests.bench import budgets, gpu, gpu_runs, gpu_steps, harness, scaling
from tests.bench.harness import Settings
from tests.waiting import until
from wan22.accel.offload.offloader import free


class Clock:
    """Time that passes only when `work` is called."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, durations):
        durations = iter(durations)

        def function():
            self.calls.append(name)
            self.now += next(durations)

        return function


def test_turns_alternate_and_the_first_call_does_not_count():
    clock = Clock()
    ours, theirs = clock.work("o", [90, 1, 2, 4]), clock.work("t", [90, 3, 4, 8])
    assert harness.by_turns(ours, theirs, 3, clock) == ([1, 2, 4], [3, 4, 8])
    assert "".join(clock.calls) == "ot" + "ot" + "to" + "ot"


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    # The second round was disturbed: both sides took ten times as long.
    row = harness.summary([1.0, 10.0, 2.0], [2.0, 20.0, 3.0])
    assert row == {"ours_s": 2.0, "diffusers_s": 3.0, "ratio": 2.0, "rounds": 3}


def test_a_target_is_met_or_missed(monkeypatch):
    seconds = [1.0, 1.0], [1.2, 1.2]
    monkeypatch.setattr(harness, "by_turns", lambda *args: seconds)
    for target, met in ((1.1, True), (1.3, False)):
        row = harness.compare("a", None, None, Settings(), target, dtype="fp32")
        assert (row["met"], row["target"], row["dtype"]) == (met, f">= {target}x", "fp32")
    assert "met" not in harness.compare("a", None, None, Settings())


def test_table():
    rows = [
        {"name": "block", "dtype": "bf16", "ours_s": 2.0, "diffusers_s": 0.01, "ratio": 0.005, "note": "n"},
        {"name": "no room", "shape": "1x1", "target": ">= 2x", "met": False},
    ]
    head, rule, first, second = harness.table(rows).splitlines()
    assert [cell.strip() for cell in head.split("|")][1:-1] == list(harness.COLUMNS)
    assert set(rule) == {"|", "-"}
    cells = [cell.strip() for cell in first.split("|")][1:-1]
    assert cells == ["block", "bf16", "", "2.00 s", "10.0 ms", "0.01x", "", "n"]
    assert [cell.strip() for cell in second.split("|")][7] == ">= 2x, missed"
    assert len({len(line) for line in (head, rule, first, second)}) == 1


def test_json(tmp_path):
    rows = [{"name": "block", "ours_s": 2.0, "diffusers_s": 3.0, "ratio": 1.5, "rounds": 7}]
    harness.save(rows, tmp_path / "rows.json")
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["rows"] == rows
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["cores"] >= 1
    assert saved["machine"].keys() == {"cpu", "cores", "threads", "torch", "card"}


def test_memory_that_is_given_back_counts_at_its_peak():
    free()  # or the block might lie in memory that an earlier test left to the allocator
    with harness.watched_memory() as memory:
        block = torch.ones(50_000_000)  # 0.2 GB
        until(lambda: memory.peak >= 0.15)  # the next look
        del block
    assert memory.after <= memory.peak


def test_tokens():
    assert [video.tokens for video in gpu_steps.VIDEOS] == [32760, 75600, 27280]


@pytest.mark.slow
def test_gpu_benchmark_runs_small_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_steps, "peaks", lambda calls, device: {"note": "peaks; "})
    names = [
        name for name in gpu.PIECES if name not in ("smoke", "tests", "budget")
    ]  # have tests of their own
    file = tmp_path / "rows.json"
    rows = gpu.measured(names, Settings(rounds=1), "cpu", tiny=True, file=file)
    told = [row["name"].partition(", ")[2] for row in rows]
    steps, decodes = ["eager", "fused", "compiled"], [way for _, _, way in gpu_steps.WAYS]
    runs = ["4 guided steps", "fp8, beside bf16", "fp8_dynamic, beside bf16"]
    assert told == [*steps * 3, *runs, *decodes * 2]
    assert json.loads(file.read_text())["rows"] == rows
    for row in rows:
        assert row["ours_s"] > 0
        assert row.get("diffusers_s", 1) > 0
        # bf16 here has a float32 residual stream, diffusers' has a bf16 one.
        assert row.get("difference", 0) <= (1e-5 if row["dtype"].startswith("fp32") else 5e-2)
    assert rows[1]["note"].startswith("peaks; ")
    assert all("kernel" in row["note"] for row in rows[:3])
    assert 0 < rows[0]["share_of_floor"] < 10


def test_a_gpu_is_tried_with_the_miniatures():
    rows = list(gpu_runs.smoke(Settings(rounds=1), "cpu", True))
    assert [row["difference"] for row in rows] == [0, 0, 0]
    assert all(row["met"] for row in rows)


@pytest.mark.slow
def test_the_tests_of_gpus_are_run():
    (row,) = gpu_runs.gpu_tests(Settings(rounds=1), "cpu", True)
    assert row["met"] and "skipped" in row["note"]


def test_what_fails_on_a_gpu_costs_no_other_row(monkeypatch, tmp_path):
    def failing(settings, device, tiny):
        yield {"name": "first"}
        raise RuntimeError("no kernel image")

    pieces = {"a": gpu.Piece(1, failing), "b": gpu.Piece(1, lambda *_: [{"name": "second"}])}
    monkeypatch.setattr(gpu, "PIECES", pieces)
    rows = gpu.measured(pieces, Settings(), "cpu", True)
    assert [row["name"] for row in rows] == ["first", "a", "second"]
    assert rows[1]["note"] == "RuntimeError: no kernel image" and rows[1]["met"] is False
    assert (
        gpu.measured(pieces, Settings(), "cpu", True, seconds=-1)[0]["note"] == "left out: the time is over"
    )


def test_three_parts_are_all():
    assert {piece.part for piece in gpu.PIECES.values()} == {1, 2, 3}


def test_the_section_of_measurements_is_filled_in(tmp_path):
    file, readme = tmp_path / "rows.json", tmp_path / "README.md"
    harness.save([{"name": "step", "ours_s": 2.0, "diffusers_s": 3.0, "ratio": 1.5}], file)
    for text in (gpu.README.read_text(), None):  # and once more, over what was there
        readme.write_text(text or readme.read_text())
        gpu.fill([file, file], readme)
        assert readme.read_text().count("| step ") == 2
        assert f"PyTorch {torch.__version__}:" in readme.read_text()
    before, rest = gpu.README.read_text().split(gpu.BEGIN)
    assert readme.read_text().startswith(before) and readme.read_text().endswith(rest.split(gpu.END)[1])


def scaled(rank):
    return scaling.run(Settings(rounds=1), device="cpu", tiny=True)


def test_scaling_benchmark_runs_small_on_the_cpu():
    for rows in on_ranks(2, scaled):
        parts = [row["name"].partition(": ")[2] for row in rows]
        steps = [f"2 steps, {layout}" for layout in ("cfg 1, ulysses 1, ring 2", "cfg 1, ulysses 2, ring 1")]
        assert parts == [*steps, "2 steps, cfg 2, ulysses 1, ring 1", "decode"] * 2
        assert all(row["ratio"] > 0 for row in rows)
        assert all(row["difference"] <= 1e-2 for row in rows if "steps" in row["name"])


def test_budget_benchmark_runs_small_on_the_cpu():
    row = budgets.within("12GB", "cpu", tiny=True)
    assert row["met"]
    assert row["predicted_peak_gb"] > 0
    assert row["measured_peak_gb"] > 0
