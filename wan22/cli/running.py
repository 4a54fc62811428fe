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
from ..pictures import is_url
from .loading import load
from .options import Loading, Saving, Target, flags_of
from .reporting import Result, report, say

if TYPE_CHECKING:
    from .loading import Pipeline


def generate(task: str, call: Mapping[str, Any], loading: Loading, target: Target, saving: Saving) -> None:
    """Load a pipeline, run one call, save its videos, report."""
    for name in ("preview_every", "preview_decoder"):
        if name in call and "preview" not in call:
            raise ValueError(f"{flags_of(name)[0]} needs --preview FILE")
    image = call.get("image")
    if image is not None and not is_url(image) and not Path(image).expanduser().is_file():
        raise FileNotFoundError(f"there is no file {image}")
    path = target.output or free_name("video" if saving.no_prompt else call["prompt"])
    pipe = load(task, loading, saving.quiet)
    say(f"{pipe.checkpoint_name} on {pipe.device}, to {path}", saving.quiet)
    count = call.get("num_videos_per_prompt", 1)
    report(make(pipe, partial(pipe, **call), path, target.overwrite, saving, count), saving.as_json)


def make(
    pipe: "Pipeline", run: Callable[[], Any], path: Path, overwrite: bool, saving: Saving, count: int = 1
) -> Result:
    """Run a call of a pipeline, which makes `count` videos, and save them.

    A wrong ending or quality and a file that exists are refused before the run.
    """
    from ..video import writers
    from ..whole_files import whole_file

    writers.check_ending(path)
    writers.check_quality(path, saving.quality, saving.crf)
    sheet = path.with_name(f"{path.stem}-sheet.png")
    if is_first():
        writers.numbered(path, count, overwrite)
        if saving.contact_sheet and sheet.exists() and not overwrite:
            raise FileExistsError(f"{sheet} exists; overwrite=True replaces it")
    start = time.perf_counter()
    with stopping_on_ctrl_c(pipe):
        video = run()
    made = time.perf_counter()
    kept = {"recipe": not saving.no_recipe, "prompt": not saving.no_prompt}
    files = video.save(path, overwrite, quality=saving.quality, crf=saving.crf, **kept)
    if saving.contact_sheet and is_first():
        with whole_file(sheet, overwrite) as partial:
            video.contact_sheet(prompt=not saving.no_prompt).save(partial)
        files.append(sheet)
    seconds = {"make": round(made - start, 2), "save": round(time.perf_counter() - made, 2)}
    return Result([str(file) for file in files], video.recipe, seconds)


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
