"""`wan22 prepare`: convert a checkpoint once, so that later loads need not."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ..checks import printable
from .loading import find_model
from .reporting import err, plain, print_lines, say
from .signatures import PIPELINES

if TYPE_CHECKING:
    from ..checkpoints.preparing.prepare import Preparation
    from ..pipelines.loading.checkpoint import Checkpoint


def prepare_model(model: str, dtype: str, revision: str | None, yes: bool, as_json: bool) -> None:
    """Show what preparing a checkpoint writes, ask, and write it."""
    from ..checkpoints.preparing.cache import FORMS, cache_folder
    from ..checkpoints.preparing.prepare import preparations, prepare
    from ..checks import check_choice

    check_choice("--dtype", dtype, FORMS)
    checkpoint = _located(model, revision)
    _confirm_download(checkpoint, yes)
    work = preparations(_models(checkpoint), dtype)
    missing = [part for part in work if not part.done]
    if not as_json:
        _show(work, checkpoint.source)
    if missing:
        need, place = sum(part.nbytes_left for part in missing), cache_folder()
        _check_room(place, need)
        _confirm(f"write {need / 1e9:.3g} GB to {place}?", yes)
    prepare(work, progress=True)
    if as_json:
        found = [{"component": p.name, "form": p.form, "folder": str(p.folder)} for p in work]
        print(json.dumps({"prepared": found}))
    elif work:
        print_lines(*(part.folder for part in work))


def _located(model: str, revision: str | None) -> "Checkpoint":
    from ..checkpoints.loading.recognize import kinds_in, read_model
    from ..pipelines.loading.load import locate
    from ..pipelines.loading.single_files import SingleFiles

    source = find_model(model, "t2v")
    if not Path(source).is_file():
        return locate(str(source), {} if revision is None else {"revision": revision})
    if revision is not None:
        raise ValueError(f"--revision {revision} is for repositories; {source} is a file")
    path = Path(source)
    return SingleFiles(dict.fromkeys(kinds_in(path) or [read_model(path).kind], path))


def _models(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Return a checkpoint's models, after their download."""
    import torch

    import wan22

    from ..pipelines.loading.checkpoint import Wanted

    classes = [getattr(wan22, name) for name in PIPELINES.values()]
    fitting = [cls for cls in classes if checkpoint.kind in (cls.__name__, *cls.checkpoint_kinds)]
    return checkpoint.fetch((fitting or classes)[0], Wanted(dtype=torch.bfloat16))


def _confirm_download(checkpoint: "Checkpoint", yes: bool) -> None:
    from huggingface_hub import constants

    from ..pipelines.loading.checkpoint import is_folder
    from ..pipelines.loading.preparing import bytes_to_download

    if not checkpoint.downloads or is_folder(checkpoint.source):
        return
    hub = getattr(checkpoint, "hub", {})
    if need := bytes_to_download(checkpoint.source, checkpoint.downloads, hub):
        place = Path(constants.HF_HUB_CACHE)
        _check_room(place, need)
        _confirm(f"download {need / 1e9:.3g} GB of {checkpoint.source} to {place}?", yes)


def _check_room(place: Path, need: int) -> None:
    from ..checkpoints.converting.writing import check_room, free_bytes
    from ..checkpoints.preparing.prepare import ELSEWHERE

    check_room(place, need, ELSEWHERE)
    say(f"{free_bytes(place) / 1e9:.3g} GB are free in {place}")


def _confirm(question: str, yes: bool) -> None:
    """Ask, unless --yes was given; without a terminal nobody could answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"{question.removesuffix('?')}: nobody can be asked here; --yes agrees")
    if not typer.confirm(printable(question), err=True):
        raise typer.Exit(1)


def _show(work: "list[Preparation]", source: str) -> None:
    """Print what is stored and what is written of each component, on stderr."""
    if not work:
        say(f"{source} has nothing to prepare: its weights are in bfloat16 already, or quantised")
        return
    table = Table("component", "stored", "prepared", "", box=None)
    for part in work:
        stored = ", ".join(f"{size / 1e9:.3g} GB {dtype}" for dtype, size in part.stored.sizes.most_common())
        state = "there already" if part.done else ""
        size = f"{part.plan.nbytes / 1e9:.3g} GB {part.form}"
        table.add_row(plain(part.name), plain(stored), plain(size), state)
    err.print(table)
