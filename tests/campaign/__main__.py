"""The command: trials of all areas by turns, until the time is over; faults, and a table."""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import tests.campaign as package
from tests.campaign.checkpoints import Folders, Loras, WeightFiles
from tests.campaign.isolation import FAULTS, Outcome, Trial, isolated
from tests.campaign.media import ChatServers, Images, ImageServers, Recipes
from tests.campaign.processes import Converting, Saving, Threads
from wan22.progress import loading_bars

BATCH = 10  # trials of an area before the next one's turn


class Area(Protocol):
    """A kind of input: what is tried of it, and how."""

    name: str

    def __init__(self, folder: Path) -> None: ...

    def cases(self) -> st.SearchStrategy[Any]:
        """Return what inputs there are."""
        ...

    def trial(self, case: Any, folder: Path) -> Trial:
        """Return the trial of an input, whose files belong into an empty folder."""
        ...


AREAS: tuple[type[Area], ...] = (
    *(WeightFiles, Folders, Loras, Recipes, Images, ImageServers, ChatServers, Saving, Converting, Threads),
)


class Campaign:
    """Trials, and what came of them."""

    def __init__(self, first_seed: int, folder: Path) -> None:
        self.first_seed, self.folder = first_seed, folder
        self.counts: dict[str, Counter[str]] = {}
        self.faults: dict[tuple[str, str, str], str] = {}  # an example of each kind

    def batch(self, area: Area, number: int, trials: int = BATCH) -> None:
        """Make some trials of an area; the number makes them others than before."""
        counts = self.counts.setdefault(area.name, Counter())

        @seed(f"{self.first_seed} {area.name} {number}")
        @settings(
            max_examples=trials,
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(area.cases())
        def each(case: Any) -> None:
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                outcome = isolated(area.trial(case, Path(place)))
            counts[outcome.verdict] += 1
            self.note(area, case, outcome)

        each()

    def note(self, area: Area, case: Any, outcome: Outcome) -> None:
        """Keep and print the first example of each kind of fault."""
        kind = area.name, outcome.verdict, outcome.seen.partition(": ")[0]
        if outcome.verdict != "right" and kind not in self.faults:
            self.faults[kind] = outcome.seen
            print(f"{area.name}: {FAULTS[outcome.verdict]}: {outcome.seen!r}; {repr(case)[:300]}", flush=True)

    def table(self) -> str:
        """Return the counts as Markdown."""
        lines = ["| what | tried | right | wrong |", "|---|---|---|---|"]
        for name, counts in self.counts.items():
            wrong = [f"{counts[fault]} {text}" for fault, text in FAULTS.items() if counts[fault]]
            lines.append(f"| {name} | {counts.total()} | {counts['right']} | {', '.join(wrong) or '0'} |")
        return "\n".join(lines)


@contextmanager
def _quietly() -> Iterator[None]:
    """Ask the libraries for no warnings and no bars, and PyTorch for one thread."""
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # a process that is forked has no threads of its parent
    try:
        with warnings.catch_warnings(), loading_bars(drawn=False):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(disabled)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; returns the number of kinds of faults."""
    names = [area.name for area in AREAS]
    parser = argparse.ArgumentParser(
        description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of all areas together (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=names, metavar="AREA", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args(arguments)
    with _quietly(), tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as folder:
        chosen = [area for area in AREAS if area.name in (options.only or names)]
        areas = [area(Path(tempfile.mkdtemp(dir=folder))) for area in chosen]
        campaign = Campaign(options.seed, Path(folder))
        end, number = time.monotonic() + 60 * options.minutes, 0
        while not number or time.monotonic() < end:
            for area in areas:
                campaign.batch(area, number)
            number += 1
    print(campaign.table())
    if options.json:
        options.json.write_text(json.dumps(campaign.counts))
    return len(campaign.faults)


if __name__ == "__main__":
    sys.exit(min(1, main()))
