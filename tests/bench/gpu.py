"""What is to be known of a GPU, in three parts of at most nine minutes on an H200.

    python -m tests.bench.gpu --part 1 --json one.json
    python -m tests.bench.gpu --only steps-480p decodes [--device cpu --tiny]
    python -m tests.bench.gpu --fill one.json two.json three.json

Rows are written to the file as they are measured, so that a run which is cut off keeps what it has; what
would begin after `--minutes` is left out, and a row says so. `--fill` measures nothing: it puts the rows of
files into the section of README.md beside this script.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.bench import budgets, gpu_runs
from tests.bench.gpu_steps import VIDEOS, Video, decodes, small, steps
from tests.bench.harness import Row, Settings, apart, gpu_arguments, report, save, settings_of, table

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- measured on a GPU -->\n", "<!-- end of what is measured on a GPU -->"
ROUNDS = 2  # a call takes seconds, and a GPU is steady

Measure = Callable[[Settings, str, bool], Iterable[Row]]


@dataclass(frozen=True)
class Piece:
    """Rows that are measured together, and the part of three that they belong to."""

    part: int
    measure: Measure


def _steps(video: Video, settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    return steps(small(video) if tiny else video, settings, device, tiny)


def _decodes(settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    for video in VIDEOS[1:]:
        yield from decodes(small(video) if tiny else video, settings, device, tiny)


def _budget(settings: Settings, device: str, tiny: bool) -> list[Row]:
    return [apart(budgets.within, budgets.BUDGETS[0], device, tiny)]


PIECES: dict[str, Piece] = {
    "smoke": Piece(1, gpu_runs.smoke),
    "steps-480p": Piece(1, partial(_steps, VIDEOS[0])),
    "steps-5b": Piece(1, partial(_steps, VIDEOS[2])),
    "tests": Piece(1, gpu_runs.gpu_tests),
    "steps-720p": Piece(2, partial(_steps, VIDEOS[1])),
    "few-steps": Piece(2, gpu_runs.few_steps),
    "fp8": Piece(2, gpu_runs.float8),
    "decodes": Piece(3, _decodes),
    "budget": Piece(3, _budget),
}


def run(settings: Settings, device: str = "cuda", tiny: bool = False) -> list[Row]:
    """Measure all pieces; quick: a step of A14B at 480p alone."""
    return measured(["steps-480p"] if settings.quick else PIECES, settings, device, tiny)


def measured(
    names: Iterable[str],
    settings: Settings,
    device: str,
    tiny: bool,
    seconds: float = float("inf"),
    file: Path | None = None,
) -> list[Row]:
    """Measure pieces one after another, and write the rows so far to the file after each row."""
    settings, end = replace(settings, rounds=min(settings.rounds, ROUNDS)), time.monotonic() + seconds
    rows: list[Row] = []
    for name in names:
        if time.monotonic() > end:
            rows.append({"name": name, "note": "left out: the time is over"})
            continue
        for row in _rows(name, settings, device, tiny):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            if file is not None:
                save(rows, file)
        gc.collect()
    return rows


def _rows(name: str, settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Yield a piece's rows; one that fails costs no other."""
    try:
        yield from PIECES[name].measure(settings, device, tiny)
    except Exception as error:  # whatever breaks on a card that nothing has run on is a result
        yield {"name": name, "met": False, "target": "runs", "note": f"{type(error).__name__}: {error}"[:500]}


def fill(files: Iterable[Path], readme: Path = README) -> None:
    """Put the rows of JSON files, and what they were measured on, into a README's section."""
    found = [json.loads(file.read_text()) for file in files]
    on = {
        f"{entry['machine']['card'] or entry['machine']['cpu']}, PyTorch {entry['machine']['torch']}"
        for entry in found
    }
    rows = [row for entry in found for row in entry["rows"]]
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\nOn {' and '.join(sorted(on))}:\n\n{table(rows)}\n\n{END}{after}")


def main(arguments: list[str] | None = None) -> None:
    """Be the command line."""
    parser = gpu_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="one of three parts")
    parser.add_argument("--only", nargs="+", choices=PIECES, metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--minutes", type=float, default=9, help="after which no piece begins (default: 9)")
    parser.add_argument("--fill", nargs="+", type=Path, metavar="FILE", help="fill in the README's section")
    options = parser.parse_args(arguments)
    if options.fill:
        fill(options.fill)
        return
    names = options.only or [n for n, piece in PIECES.items() if options.part in (None, piece.part)]
    seconds = 60 * options.minutes if options.part else float("inf")
    rows = measured(names, settings_of(options), options.device, options.tiny, seconds, options.json)
    report(rows, options.json)


if __name__ == "__main__":
    main()
