"""Savers and converters that are killed, and threads that share a pipeline: the same bytes in the end."""

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tqdm.auto import tqdm

from tests.builders import latents_of, load_pipeline, random_pipeline
from tests.campaign.isolation import Trial
from wan22 import WanT2VPipeline, tiny_checkpoint
from wan22.checkpoints.converting.convert import convert

ENDINGS = ("mp4", "gif", "webp")
FORMATS = ("official", "diffusers", "single-file")


def contents(place: Path) -> dict[str, str]:
    """Return each file's name and digest, of one file or of a folder."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_after(seconds: float, work: Callable[[], Any]) -> None:
    """Do something in a forked process, which is killed after some time."""
    process = os.fork()
    if not process:
        # tqdm's own lock is shared by forked processes: what is killed while it holds it blocks all others.
        tqdm.set_lock(threading.RLock())
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


class Saving:
    """A saver is killed at any time: the file is whole or not there, and can be saved again."""

    name = "savers killed"

    def __init__(self, folder: Path) -> None:
        sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
        self.video = random_pipeline()("a cat", seed=0, **sizes)
        self.whole, self.seconds = {}, {}
        for ending in ENDINGS:
            started = time.monotonic()
            self.video.save(folder / f"a.{ending}")
            self.whole[ending] = contents(folder / f"a.{ending}")
            self.seconds[ending] = time.monotonic() - started

    def cases(self) -> st.SearchStrategy[Any]:
        return st.tuples(st.sampled_from(ENDINGS), st.floats(0, 1.2))

    def trial(self, case: tuple[str, float], folder: Path) -> Trial:
        ending, share = case
        path = folder / f"a.{ending}"

        def run() -> str | None:
            killed_after(share * self.seconds[ending], lambda: self.video.save(path))
            if path.exists() and contents(path) != self.whole[ending]:
                return "half a file"
            self.video.save(path, overwrite=True)
            return None if contents(path) == self.whole[ending] else "other bytes"

        return Trial(run, path.name)


class Converting:
    """A converter is killed once or several times: the result is there whole or not at all, and resumed."""

    name = "converters killed"

    def __init__(self, folder: Path) -> None:
        self.sources = {"official": tiny_checkpoint("t2v"), "single-file": tiny_checkpoint("ti2v")}
        self.sources["diffusers"] = convert(tiny_checkpoint("t2v"), folder / "source", "official")
        self.whole, self.seconds = {}, {}
        for to in FORMATS:
            started = time.monotonic()
            self.whole[to] = contents(convert(self.sources[to], folder / to, to))
            self.seconds[to] = time.monotonic() - started

    def cases(self) -> st.SearchStrategy[Any]:
        return st.tuples(st.sampled_from(FORMATS), st.lists(st.floats(0, 1.2), min_size=1, max_size=3))

    def trial(self, case: tuple[str, list[float]], folder: Path) -> Trial:
        to, shares = case
        target = folder / "result"

        def run() -> str | None:
            for share in shares:
                work = self.seconds[to] * share
                killed_after(work, lambda: convert(self.sources[to], target, to))
                if target.exists():
                    break
            # A kill between giving the result its name and removing the journal is for the next call.
            if not target.exists() or target.with_name("result.partial.journal").exists():
                convert(self.sources[to], target, to)
            left = [path.name for path in folder.iterdir() if path.name != target.name]
            if contents(target) != self.whole[to]:
                return "other bytes"
            return f"left behind: {left}" if left else None

        return Trial(run, target.name)


class Threads:
    """Calls from several threads on one pipeline, or on several that share models, and stops at any time."""

    name = "threads"

    def __init__(self, folder: Path) -> None:
        shutil.copytree(tiny_checkpoint("t2v"), folder / "t2v")
        self.folder = folder / "t2v"

    def cases(self) -> st.SearchStrategy[Any]:
        call = st.tuples(st.integers(0, 1), st.sampled_from((32, 48)), st.integers(0, 3), st.floats(0, 0.3))
        return st.tuples(
            st.lists(call, min_size=2, max_size=3),
            st.sampled_from((None, "all")),
            st.none() | st.floats(0, 0.5),
        )

    def trial(self, case: Any, folder: Path) -> Trial:
        calls, planned, stopped = case

        def run() -> str | None:
            torch.set_num_threads(1)
            pipes = [load_pipeline(self.folder)]
            pipes.append(WanT2VPipeline.from_pipe(pipes[0]))
            if planned:
                pipes[0].fit(ram="2GB", device="cpu", height=32, width=32, num_frames=5)
            for pipe in pipes:
                pipe.set_progress_bar_config(disable=True)
            expected = [self.latents(pipes[0], *call) for call in calls]
            found: list[Any] = [None] * len(calls)

            def work(number: int) -> None:
                try:
                    time.sleep(calls[number][3])
                    found[number] = self.latents(pipes[calls[number][0]], *calls[number])
                except BaseException as error:
                    found[number] = error

            threads = [threading.Thread(target=work, args=[i]) for i in range(len(calls))]
            for thread in threads:
                thread.start()
            if stopped is not None:
                time.sleep(stopped)
                pipes[0].stop()
            for thread in threads:
                thread.join()
            if error := next((value for value in found if isinstance(value, BaseException)), None):
                return f"{type(error).__name__}: {error}"[:200]
            if stopped is None and not all(map(torch.equal, found, expected)):
                return "other videos than one after the other"
            again = [self.latents(pipes[call[0]], *call) for call in calls]
            return None if all(map(torch.equal, again, expected)) else "other videos afterwards"

        return Trial(run, "")

    @staticmethod
    def latents(pipe: Any, _: int, size: int, seed: int, __: float) -> torch.Tensor:
        sizes = {"height": size, "width": size, "num_frames": 5, "num_inference_steps": 2}
        return latents_of(pipe, output_type="pt", seed=seed, **sizes)
