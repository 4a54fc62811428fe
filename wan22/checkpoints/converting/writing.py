"""Write what is planned, so that every file is whole or not there, and nothing is written twice."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...progress import bytes_bar
from ..files.safetensors import write_safetensors
from .plan import OutputFile, OutputTensor, Plan

_TEMPORARY = ".unfinished"  # ends the name of a file that is being written


def write_plan(plan: Plan, folder: Path, desc: str, **options: Any) -> None:
    """Write the JSON files and the weights of a plan into a folder; weight files that are there stay.

    `desc` and `options` are those of the progress bar, `bytes_bar`. An OSError says that the disk has not
    enough room, before any weights are written or when it fills up.
    """
    for path, text in plan.texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    missing = plan.missing(folder)
    check_room(folder, bytes_to_write(missing))
    done = plan.nbytes - sum(file.nbytes for file in missing)
    with bytes_bar(plan.nbytes, desc, initial=done, **options):
        for file in missing:
            try:
                _write_file(file, folder / file.path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                left = bytes_to_write(plan.missing(folder)) / 1e9
                rule = "make room, and the same command goes on from here"
                raise OSError(
                    f"{folder}: the disk is full, {left:.3g} GB are not written yet; {rule}"
                ) from error


def _write_file(file: OutputFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + _TEMPORARY)
    (_write_pth if path.suffix == ".pth" else write_safetensors)(unfinished, file.tensors)
    unfinished.rename(path)


def bytes_to_write(files: list[OutputFile]) -> int:
    """Return the bytes that writing files needs on the disk."""
    # A .pth is on the disk twice while it is written.
    twice = max((file.nbytes for file in files if file.path.endswith(".pth")), default=0)
    return sum(file.nbytes for file in files) + twice


def free_bytes(folder: Path) -> int:
    """Return the bytes that the disk of a folder, which need not be there yet, has left."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def check_room(folder: Path, need: int, advice: str = "") -> None:
    """Refuse to write more than the disk of a folder has room for; the error ends with `advice`."""
    if need > (free := free_bytes(folder)):
        raise OSError(
            f"{folder} needs {need / 1e9:.3g} GB more, but its disk has {free / 1e9:.3g} GB left{advice}"
        )


def sync_folder(folder: Path) -> None:
    """Let the names in a folder be on the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_pth(path: Path, tensors: tuple[OutputTensor, ...]) -> None:
    """Write PyTorch's format, which takes all tensors at once: through a file, from where they are mapped."""
    scratch = path.with_name(f"{path.name}.scratch")
    try:
        write_safetensors(scratch, tensors)
        mapped = load_file(scratch)
        torch.save({tensor.key: mapped[tensor.key] for tensor in tensors}, path)
        del mapped
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        scratch.unlink(missing_ok=True)
