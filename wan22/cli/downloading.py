"""`wan22 download`: the files that a load needs; and what asks before it downloads or writes."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..checks import printable
from .loading import find_model
from .options import Output
from .reporting import print_lines, say
from .signatures import PIPELINES

if TYPE_CHECKING:
    from ..pipelines.loading.checkpoint import Checkpoint


def download_model(model: str, revision: str | None, yes: bool, output: Output) -> None:
    """Show the size of what is not here yet, ask, and download it."""
    source = str(find_model(model, "t2v"))
    if Path(source).exists():
        say(f"{model} is on this machine already")
    else:
        say(f"looking up {source}")
        checkpoint = locate(source, revision)
        confirm_download(checkpoint, yes)
        fetch(checkpoint)
        source = _folder_of(checkpoint)
    print_lines(json.dumps({"model": model, "folder": source}) if output.as_json else source)


def locate(source: str, revision: str | None) -> "Checkpoint":
    """Return the checkpoint in a folder or repository, of which only configurations are downloaded."""
    from ..pipelines.loading import load

    return load.locate(source, {} if revision is None else {"revision": revision})


def fetch(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Return a checkpoint's models, after their download."""
    import torch

    import wan22

    from ..pipelines.loading.checkpoint import Wanted

    classes = [getattr(wan22, name) for name in PIPELINES.values()]
    fitting = [cls for cls in classes if checkpoint.kind in (cls.__name__, *cls.checkpoint_kinds)]
    return checkpoint.fetch((fitting or classes)[0], Wanted(dtype=torch.bfloat16))


def confirm_download(checkpoint: "Checkpoint", yes: bool) -> None:
    """Say how much would be downloaded and whether there is room, and ask; nothing if all is here."""
    from huggingface_hub import constants

    from ..pipelines.loading import preparing
    from ..pipelines.loading.checkpoint import is_folder

    if not checkpoint.downloads or is_folder(checkpoint.source):
        return
    hub = getattr(checkpoint, "hub", {})
    if need := preparing.bytes_to_download(checkpoint.source, checkpoint.downloads, hub):
        place = Path(constants.HF_HUB_CACHE)
        check_room(place, need)
        confirm(f"download {need / 1e9:.3g} GB of {checkpoint.source} to {place}?", yes)


def check_room(place: Path, need: int) -> None:
    """Refuse a disk without room for so many bytes, and say how much it has."""
    from ..checkpoints.converting import writing
    from ..checkpoints.preparing.prepare import ELSEWHERE

    writing.check_room(place, need, ELSEWHERE)
    say(f"{writing.free_bytes(place) / 1e9:.3g} GB are free in {place}")


def confirm(question: str, yes: bool) -> None:
    """Ask, unless --yes was given; without a terminal nobody could answer."""
    if yes:
        say(question.removesuffix("?"))
        return
    if not sys.stdin.isatty():
        raise ValueError(f"{question.removesuffix('?')}: nobody can be asked here; --yes agrees")
    if not typer.confirm(printable(question), err=True):
        raise typer.Exit(1)


def _folder_of(checkpoint: "Checkpoint") -> str:
    """Return the folder of a repository's files in the cache."""
    from huggingface_hub import snapshot_download

    hub = {**getattr(checkpoint, "hub", {}), "local_files_only": True}
    return str(snapshot_download(checkpoint.source, allow_patterns=checkpoint.downloads, **hub))
