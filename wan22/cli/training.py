"""`wan22 train`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..accel.parallel.environment import is_first
from .loading import find_model
from .options import Loading, Output
from .planning import outlined_task
from .reporting import INTERRUPTED, aligned, print_lines, say, warn
from .stopping import stopping

if TYPE_CHECKING:
    from ..training.config import TrainConfig

BARS, WIDTH = 20, 50  # rows of a histogram, and the characters of its longest
SAMPLES = 4096


def train_loras(file: Path | None, settings: Mapping[str, Any], resume: bool, output: Output) -> None:
    """Train, and print the files; Ctrl-C saves the state."""
    from ..progress import loading_bars
    from ..training.loop import Training

    config = _config(file, settings)
    say("".join(f"  {line}\n" for line in config.to_toml().splitlines()).rstrip())
    with loading_bars(output.draws_bars):
        training = Training(config, resume)
    with stopping(training, say, "and saving its state"):
        result = training.run()
    if is_first():
        found = {
            "files": {slot: str(path) for slot, path in result.files.items()},
            **{name: getattr(result, name) for name in ("steps", "loss", "validation", "stopped")},
        }
        print_lines(json.dumps(found) if output.as_json else "\n".join(found["files"].values()))
    if result.stopped:
        warn(f"stopped after step {result.steps}; the same command with --resume goes on from here")
        sys.stdout.flush()
        raise typer.Exit(INTERRUPTED)


def show_noise_levels(file: Path | None, settings: Mapping[str, Any], output: Output) -> None:
    """Draw, for each expert, how often its samples have which timestep."""
    from ..training.loading import LABELS, timesteps_of

    config = _config(file, {"data": "-", "output": "-", **settings}, find=False)
    pipe = outlined_task(Loading(model=config.model))[1]
    found = {}
    for slot, timesteps in timesteps_of(pipe, config).items():
        times = 1000 * timesteps.sample(config.seed, range(SAMPLES))
        found[slot] = times.histc(BARS, 0, 1000).int().tolist()
        if not output.as_json:
            label = LABELS[slot] if pipe.config.boundary_ratio is not None else "all noise levels"
            most, each = max(found[slot]), 1000 // BARS
            rows = []
            for i, n in enumerate(found[slot]):
                share, bar = f"{100 * n / SAMPLES:.1f} %", "█" * round(WIDTH * n / most)
                rows.append((f"{i * each} to {(i + 1) * each}", share, bar))
            median = times.median().item()
            print_lines(f"{label}: timesteps of {SAMPLES} samples, median {median:.0f}", aligned(rows), "")
    if output.as_json:
        print(json.dumps({"samples": SAMPLES, "histogram": found}))


def _config(file: Path | None, settings: Mapping[str, Any], find: bool = True) -> "TrainConfig":
    """Return the settings in a file and of the options; the model is a path or a repository."""
    from ..training.config import read_config

    config = read_config(file, **settings)
    return config.changed(model=str(find_model(config.model, "t2v"))) if find else config
