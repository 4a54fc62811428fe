"""Write what is planned, so that every file is whole or not there, and nothing is written twice."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors.torch import load_file

from ...progress import bytes_bar
from ...whole_files import NO_ROOM, whole_file
from ..files.safetensors import write_safetensors
from .plan import OutputFile, OutputTensor, Plan
from .unfinished import Unfinished


def write_plan(
    plan: Plan, unfinished: Unfinished, desc: str, beside: Collection[str] = (), **options: Any
) -> None:
    """Write the files of a plan that are not finished yet.

    Args:
        plan: what to write.
        unfinished: where to, in its context.
        desc: what the progress bar says; `options` are those of `bytes_bar`.
        beside: files that the caller adds.

    Raises:
        FileExistsError: something else is in the way.
        OSError: the disk has not enough room: before a byte is written, or when it fills up.
    """
    unfinished.check({*plan.paths, *beside})
    folder, missing = unfinished.folder, plan.missing(unfinished)
    check_room(folder, bytes_to_write(missing) + plan.nbytes_beside)
    with _explaining_a_full_disk(plan, unfinished):
        unfinished.begin()
    for path, text in plan.texts.items():
        with _explaining_a_full_disk(plan, unfinished, path), whole_file(folder / path) as temporary:
            temporary.write_text(text)
    for path, source in plan.copied.items():
        with _explaining_a_full_disk(plan, unfinished, path), whole_file(folder / path) as temporary:
            shutil.copyfile(source, temporary)
    done = plan.nbytes - sum(file.nbytes for file in missing)
    with bytes_bar(plan.nbytes, desc, initial=done, **options):
        for file in missing:
            with _explaining_a_full_disk(plan, unfinished, file.path):
                _write_file(file, folder / file.path)
                unfinished.add(file.path)


@contextmanager
def _explaining_a_full_disk(plan: Plan, unfinished: Unfinished, path: str = "") -> Iterator[None]:
    """Let the error that a file has no room say which one, and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        left = bytes_to_write(plan.missing(unfinished)) / 1e9
        place = unfinished.folder / path if path else unfinished.journal
        raise OSError(
            error.errno,
            f"{unfinished.folder}: {NO_ROOM[error.errno]}, {left:.3g} GB are not written yet; make room, and "
            f"the same command goes on with {place}",
        ) from error


def _write_file(file: OutputFile, path: Path) -> None:
    with whole_file(path) as temporary:
        (_write_pth if path.suffix == ".pth" else write_safetensors)(temporary, file.tensors)


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


def _write_pth(path: Path, tensors: tuple[OutputTensor, ...]) -> None:
    """Write PyTorch's format, which takes all tensors at once: through a file, from where they are mapped."""
    scratch = path.with_name(f"{path.name}.scratch")
    try:
        write_safetensors(scratch, tensors)
        mapped = load_file(scratch)
        with path.open("wb") as file:
            written = _Written(file)
            try:
                # PyTorch would write the file's name into it, if it knew the name.
                torch.save({tensor.key: mapped[tensor.key] for tensor in tensors}, cast(BinaryIO, written))
            except RuntimeError:
                if written.error is None:
                    raise
                raise written.error from None
            file.flush()
            os.fsync(file.fileno())
        del mapped
    finally:
        scratch.unlink(missing_ok=True)


class _Written:
    """A file for PyTorch, which says of an error only that there was one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
