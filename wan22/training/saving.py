"""The states of a training, from which it goes on, and the LoRAs that belong to them.

OUTPUT/config.toml, losses.jsonl
OUTPUT/steps/000500/state.pt, lora_high_noise.safetensors, …
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks import cut
from ..whole_files import whole_file

STATE = "state.pt"
FORMAT = 1


def states_in(output: Path) -> list[Path]:
    """Return the folders of complete states, the last one last."""
    found = [
        path for path in (output / "steps").glob("*") if path.name.isdigit() and (path / STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name))


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all; a folder has one last, when its other files are complete."""
    with whole_file(folder / STATE) as partial:
        torch.save({"format": FORMAT, **state}, partial)


def read_state(folder: Path) -> dict[str, Any]:
    """Read a state; a ValueError names a file that is none."""
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch's reader raises of a broken file
        raise ValueError(f"{cut(path)} cannot be read: {cut(error)}; remove its folder") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{cut(path)} is no state of this version of wan22")
    return state


def prune(output: Path, keep: int) -> None:
    """Remove all states but the last ones, and what a killed run has left incomplete."""
    kept = states_in(output)[-keep:]
    for folder in (output / "steps").glob("*"):
        if folder.name.isdigit() and folder not in kept:
            (folder / STATE).unlink(missing_ok=True)  # first, so that no half-removed state looks whole
            shutil.rmtree(folder)


class Losses:
    """losses.jsonl: one line for each step, and for each validation after a step.

    Args:
        path: the file.
        last: the step that a run goes on from; lines of later ones are of a run that did not save them, and
            go.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _step(line) <= last]
        with whole_file(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, **values: Any) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the end of a line that was being written
        return float("inf")
