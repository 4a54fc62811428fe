"""`wan22 prepare`: convert a checkpoint once, so that later loads need not."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .downloading import check_room, confirm, confirm_download, fetch, locate
from .loading import find_model
from .options import Output
from .reporting import aligned, print_lines, say

if TYPE_CHECKING:
    from ..checkpoints.preparing.prepare import Preparation
    from ..pipelines.loading.checkpoint import Checkpoint


def prepare_model(model: str, dtype: str, revision: str | None, yes: bool, output: Output) -> None:
    """Show what preparing a checkpoint writes, ask, and write it."""
    from ..checkpoints.preparing.cache import FORMS, cache_folder
    from ..checkpoints.preparing.prepare import preparations, prepare
    from ..checks import check_choice

    check_choice("--dtype", dtype, FORMS)
    checkpoint = _located(model, revision)
    confirm_download(checkpoint, yes)
    work = preparations(fetch(checkpoint), dtype)
    missing = [part for part in work if not part.done]
    if not output.as_json:
        _show(work, checkpoint.source)
    if missing:
        need, place = sum(part.nbytes_left for part in missing), cache_folder()
        check_room(place, need)
        confirm(f"write {need / 1e9:.3g} GB to {place}?", yes)
    prepare(work, progress=output.draws_bars)
    if output.as_json:
        found = [{"component": p.name, "form": p.form, "folder": str(p.folder)} for p in work]
        print(json.dumps({"prepared": found}))
    elif work:
        print_lines(*(part.folder for part in work))


def _located(model: str, revision: str | None) -> "Checkpoint":
    from ..checkpoints.loading.recognize import kinds_in, read_model
    from ..pipelines.loading.single_files import SingleFiles

    source = find_model(model, "t2v")
    if not Path(source).is_file():
        return locate(str(source), revision)
    if revision is not None:
        raise ValueError(f"--revision {revision} is for repositories; {source} is a file")
    path = Path(source)
    return SingleFiles(dict.fromkeys(kinds_in(path) or [read_model(path).kind], path))


def _show(work: "list[Preparation]", source: str) -> None:
    """Print what is stored and what is written of each component, on stderr."""
    if not work:
        say(f"{source} has nothing to prepare: its weights are in bfloat16 already, or quantised")
        return
    rows = [("component", "stored", "prepared", "")]
    for part in work:
        stored = ", ".join(f"{size / 1e9:.3g} GB {dtype}" for dtype, size in part.stored.sizes.most_common())
        state = "there already" if part.done else ""
        rows.append((part.name, stored, f"{part.plan.nbytes / 1e9:.3g} GB {part.form}", state))
    say(aligned(rows))
