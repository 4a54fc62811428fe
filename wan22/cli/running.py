"""Run a call and save its videos; Ctrl-C ends the run with its current step."""

import itertools
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel.parallel.environment import is_first, launched
from .loading import load
from .options import Encoding, Loading, Reporting, Target
from .reporting import Result, report, say

if TYPE_CHECKING:
    from .loading import Pipeline


def generate(
    task: str,
    call: Mapping[str, Any],
    loading: Loading,
    target: Target,
    encoding: Encoding,
    reporting: Reporting,
) -> None:
    """Load a pipeline, run one call, save its videos, report."""
    for name in ("preview_every", "preview_decoder"):
        if name in call and "preview" not in call:
            raise ValueError(f"--{name.replace('_', '-')} needs --preview FILE")
    image = call.get("image")
    if image is not None and not is_url(image) and not Path(image).expanduser().is_file():
        raise FileNotFoundError(f"there is no file {image}")
    output = target.output or free_name(call["prompt"])
    pipe = load(task, loading, reporting.quiet)
    say(f"{pipe.checkpoint_name} on {pipe.device}, to {output}", reporting.quiet)
    count = call.get("num_videos_per_prompt", 1)
    result = make(pipe, partial(pipe, **call), output, encoding, target.overwrite, count)
    report(result, reporting.as_json)


def make(
    pipe: "Pipeline",
    run: Callable[[], Any],
    target: Path,
    encoding: Encoding,
    overwrite: bool,
    count: int = 1,
) -> Result:
    """Make videos and save them.

    Args:
        pipe: the pipeline, which Ctrl-C stops.
        run: the call, which returns the videos.
        target: file of the video; several get numbers.
        encoding: how it is written.
        overwrite: whether existing files are replaced.
        count: how many videos the call makes.

    Raises:
        ValueError: the file's ending or quality breaks its rule; before the run.
        FileExistsError: a file exists; before the run.
    """
    from ..video import writers

    writers.check_ending(target)
    writers.check_quality(target, encoding.quality, encoding.crf)
    sheet = target.with_name(f"{target.stem}-sheet.png")
    if is_first():
        writers.numbered(target, count, overwrite)
        if encoding.contact_sheet and sheet.exists() and not overwrite:
            raise FileExistsError(f"{sheet} exists; overwrite=True replaces it")
    start = time.perf_counter()
    with stopping_on_ctrl_c(pipe):
        video = run()
    made = time.perf_counter()
    files = video.save(target, overwrite, quality=encoding.quality, crf=encoding.crf)
    if encoding.contact_sheet and is_first():
        video.contact_sheet().save(sheet)
        files.append(sheet)
    seconds = {"make": round(made - start, 2), "save": round(time.perf_counter() - made, 2)}
    stopped = video.recipe.steps_done is not None
    return Result([str(file) for file in files], video.recipe.to_dict(), seconds, stopped)


@contextmanager
def stopping_on_ctrl_c(pipe: "Pipeline") -> Iterator[None]:
    """Let the first Ctrl-C end the run with its step, the second at once; several ranks end at the first."""
    if launched():
        yield
        return
    stopped: list[bool] = []

    def interrupt(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        say("\nstopping after this step, with the video as it is; Ctrl-C once more stops at once")
        pipe.stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def free_name(prompt: str, folder: Path = Path(), ending: str = ".mp4") -> Path:
    """Return a file name made of a prompt that neither one video nor several have taken."""
    from ..video.writers import existing_files, numbered_name

    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60].strip("-") or "video"
    names = (folder / f"{words}{'' if i == 1 else f'-{i}'}{ending}" for i in itertools.count(1))
    return next(path for path in names if not any(map(existing_files, (path, numbered_name(path, 0)))))


def is_url(image: str) -> bool:
    """Return whether an image is on the web."""
    return image.startswith(("http://", "https://"))
