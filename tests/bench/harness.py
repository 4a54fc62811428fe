"""What the benchmarks share: two functions timed by turns, medians, peak memory, one table.

A row is a dict: name, dtype, shape, ours_s and diffusers_s (medians, in seconds; the second is one rank's
where several are compared with it), ratio (the median of the rounds' own ratios; above 1 is faster), rounds;
target and met, if there is a target; and a note of what else was measured.
"""

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
COLUMNS = ("name", "dtype", "shape", "wan22", "diffusers", "ratio", "target", "note")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        rounds: how often each of the two functions is timed.
        quick: whether the least of work will do.
        cpu_time: whether to count this process's CPU seconds, of all its threads, for a CPU that others use
            too. Threads that wait must sleep, then, not spin: set OMP_WAIT_POLICY=passive.
    """

    rounds: int = 7
    quick: bool = False
    cpu_time: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        """What is read before and after."""
        return time.process_time if self.cpu_time else time.perf_counter


def by_turns(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Time two functions by turns: whatever slows the machine for a while slows both.

    Args:
        ours: called once a round, as `theirs` is; who is first alternates. One more call of each warms up.
        theirs: what to compare with.
        rounds: how often.
        clock: seconds; on a GPU its work is waited for before it is read.

    Returns: seconds of each call of ours, and of theirs.
    """
    seconds: tuple[list[float], list[float]] = [], []
    pair = ours, theirs
    for function in pair:
        function()
    for i in range(rounds):
        for who in (0, 1) if i % 2 == 0 else (1, 0):
            synchronize()
            start = clock()
            pair[who]()
            synchronize()
            seconds[who].append(clock() - start)
    return seconds


def synchronize() -> None:
    """Wait until the GPU, if one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summary(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Return the medians of seconds measured by turns, and the median of each round's ratio."""
    return {
        "ours_s": statistics.median(ours),
        "diffusers_s": statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "rounds": len(ours),
    }


def compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    settings: Settings,
    target: float | None = None,
    **facts: Any,
) -> Row:
    """Time two functions by turns.

    Args:
        name: of the row.
        ours: function of wan22.
        theirs: that of diffusers.
        settings: how to measure.
        target: the least ratio that is good enough.
        **facts: dtype, shape, note.

    Returns: the row.
    """
    row = {"name": name, **facts, **summary(*by_turns(ours, theirs, settings.rounds, settings.clock))}
    return row if target is None else row | {"target": f">= {target:g}x", "met": row["ratio"] >= target}


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the L2 norm of the difference over that of the reference."""
    x, reference = x.double(), reference.double()
    return float((x - reference).norm() / reference.norm())


# ---- memory ----


@dataclass
class Memory:
    """Gigabytes beyond what was held before.

    Args:
        peak: the most at any time.
        after: at the end.
    """

    peak: float = 0.0
    after: float = 0.0


@contextmanager
def watched_memory(device: str = "cpu") -> Iterator[Memory]:
    """Measure the memory that a block of code takes; the numbers are there when it ends.

    On the CPU it is memory that only this process holds (RssAnon), read every 2 ms: mapped pages of files,
    which the system drops when it needs them, do not count. What a process once took its allocator may keep,
    so measure in a process of its own, see `apart`. On a GPU it is what PyTorch allocated.
    """
    memory = Memory()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield memory
        torch.cuda.synchronize()
        memory.peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        memory.after = (torch.cuda.memory_allocated() - before) / 1e9
        return
    before, done = private_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            memory.peak = max(memory.peak, (private_bytes() - before) / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
    memory.after = (private_bytes() - before) / 1e9
    memory.peak = max(memory.peak, memory.after)


def private_bytes() -> int:
    """Return how much memory only this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a new process, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- results ----


def machine() -> Row:
    """Return what the numbers were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def table(rows: Iterable[Row], other: str = "diffusers") -> str:
    """Lay rows out in columns, as Markdown that also reads well in a terminal; other: compared with what."""
    cells = [tuple(other if c == "diffusers" else c for c in COLUMNS), *map(_cells, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    measured = [_seconds(row.get("ours_s")), _seconds(row.get("diffusers_s"))]
    ratio = f"{row['ratio']:.2f}x" if row.get("ratio") is not None else ""
    target = row.get("target", "")
    if "met" in row:
        target += "" if row["met"] else ", missed"
    texts = [str(row.get(key) or "") for key in ("name", "dtype", "shape")]
    return (*texts, *measured, ratio, target, str(row.get("note", "")))


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def save(rows: Sequence[Row], file: Path) -> None:
    """Write rows, and what they were measured on, as JSON."""
    file.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=2) + "\n")


# ---- command lines ----


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark's command line takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="timed calls of each side")
    parser.add_argument("--quick", action="store_true", help="fewer cases, smaller ones")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds; set OMP_WAIT_POLICY=passive")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    """Return what a command line says."""
    return Settings(options.rounds, options.quick, options.cpu_time)


def report(rows: Sequence[Row], file: Path | None, other: str = "diffusers") -> None:
    """Print the table and what it was measured on; write the file, if there is to be one."""
    print(table(rows, other))
    print(", ".join(f"{name}: {value}" for name, value in machine().items() if value is not None))
    if file is not None:
        save(rows, file)


def main(run: Callable[[Settings], list[Row]], description: str | None = None) -> None:
    """Be the command line of one benchmark."""
    options = arguments(description).parse_args()
    report(run(settings_of(options)), options.json)


def main_on_gpu(run: Callable[[Settings, str, bool], list[Row]], description: str | None = None) -> None:
    """Be the command line of a benchmark for GPUs."""
    options = gpu_arguments(description).parse_args()
    report(run(settings_of(options), options.device, options.tiny), options.json)


def gpu_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what the command lines of benchmarks for GPUs take."""
    parser = arguments(description)
    parser.add_argument("--device", default="cuda", help="cpu goes with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small models and videos, to try the script")
    return parser
