"""Save what was made; what its own place refuses goes to another one, and is not lost."""

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel.parallel.environment import is_first
from ..checks import cut
from .options import Saving
from .reporting import line_of

if TYPE_CHECKING:
    from ..video.result import WanVideo

logger = logging.getLogger(__name__)

# What writing can end with: of the system, of ffmpeg, of Pillow.
FAILURES = (OSError, ValueError, RuntimeError, MemoryError, ImportError)


def save(video: "WanVideo", path: Path, overwrite: bool, saving: Saving) -> list[Path]:
    """Write a video, and its contact sheet if that is asked for; return the files.

    Raises: OSError: it could not be written; the message says why, and where the frames are instead.
    """
    from ..whole_files import whole_file

    options: dict[str, Any] = {
        **{"quality": saving.quality, "crf": saving.crf},
        **{"recipe": not saving.no_recipe, "prompt": not saving.no_prompt},
    }
    try:
        files = video.save(path, overwrite, **options)
    except FAILURES as error:
        logger.debug("saving failed:", exc_info=error)
        raise OSError(f"{_reason(error, path)}; {_kept(video, path, options)}") from error
    if saving.contact_sheet and is_first():
        sheet = sheet_of(path)
        try:
            with whole_file(sheet, overwrite) as partial:
                video.contact_sheet(prompt=not saving.no_prompt).save(partial)
        except FAILURES as error:
            raise OSError(f"{_reason(error, sheet)}; the video is in {_listed(files)}") from error
        files.append(sheet)
    return files


def sheet_of(path: Path) -> Path:
    """Return the file of a video's contact sheet."""
    return path.with_name(f"{path.stem}-sheet.png")


def free_path(path: Path) -> Path:
    """Return the path, or one with a number, that neither one video nor several have taken."""
    from ..video.writers import existing_files, numbered_name

    names = [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(2, 10**4))]
    return next(p for p in names if not any(map(existing_files, (p, numbered_name(p, 0)))))


def _kept(video: "WanVideo", path: Path, options: dict[str, Any]) -> str:
    """Write the frames where there is room, and say where: in their format, or else as an array."""
    folders = [Path(tempfile.gettempdir()), Path.home()]
    for folder in folders:
        for ending, how in ((path.suffix, options), (".npy", {})):
            place = free_path(folder / f"{path.stem}{ending}")
            try:
                return f"the frames are in {_listed(video.save(place, **how))}"
            except FAILURES as error:
                logger.debug("%s cannot be written, either:", place, exc_info=error)
    return f"nor could the frames be written to {' or '.join(map(str, folders))}: they are lost"


def _listed(files: list[Path]) -> str:
    first, more = files[0], len(files) - 1
    return f"{first}" if not more else f"{first} and {more} more"


def _reason(error: BaseException, path: Path) -> str:
    """Return why a file could not be written, without what ffmpeg wrote."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, str):
        return f"{cut(path)} could not be written whole: {reason}"
    text = line_of(error)
    return text if str(path.name) in text else f"{cut(path)} could not be written: {text}"
