"""Run a call and save its videos; Ctrl-C ends the run with its current step."""

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import stopping
from .checking import check_all, check_call, check_output
from .loading import load
from .options import Loading, Output, Saving, Target
from .planning import print_plan
from .reporting import Result, report, say, warn
from .saving import free_path, save

if TYPE_CHECKING:
    from .loading import Pipeline


def generate(
    task: str, call: Mapping[str, Any], loading: Loading, target: Target, saving: Saving, output: Output
) -> None:
    """Check all, load a pipeline, run one call, save its videos, report."""
    if loading.model is None:  # the first line, before any import that takes its time
        say(f"no --model given: this is tiny-{task}, the miniature inside wan22, of coloured shapes")
    else:
        say(f"checking {loading.model}")
    path = target.output or free_name("video" if saving.no_prompt else call["prompt"])
    count = call.get("num_videos_per_prompt", 1)
    check_call(call)
    check_output(path, count, target, saving)
    outline = check_all(task, call, loading, path, target.dry_run)
    if target.dry_run:
        print_plan(task, loading, outline, output, path)
        return
    if outline is not None:
        say(f"{outline.settings}, to {path}")
    pipe = load(task, loading, output)
    say(f"{pipe.checkpoint_name} on {pipe.device}")
    report(make(pipe, partial(pipe, **call), path, count, target, saving), output)


def make(
    pipe: "Pipeline", run: Callable[..., Any], path: Path, count: int, target: Target, saving: Saving
) -> Result:
    """Run a call of a pipeline, which makes `count` videos, and save them.

    A wrong ending or quality and a file that exists are refused before the run.
    """
    check_output(path, count, target, saving)
    start = time.perf_counter()
    with stopping.stopping(pipe, warn):  # saving, too: what there is after the first Ctrl-C is not lost
        # The file has 8 bits, which is a quarter to copy from a GPU and nothing to convert here.
        video = run(output_type="np" if path.suffix.lower() == ".npy" else "pil")
        made = time.perf_counter()
        files = save(video, path, target.overwrite, saving)
    seconds = {"make": round(made - start, 2), "save": round(time.perf_counter() - made, 2)}
    return Result([str(file) for file in files], video.recipe, seconds)


def free_name(prompt: str, folder: Path = Path(), ending: str = ".mp4") -> Path:
    """Return a file name made of a prompt that neither one video nor several have taken."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60].strip("-") or "video"
    return free_path(folder / f"{words}{ending}")
