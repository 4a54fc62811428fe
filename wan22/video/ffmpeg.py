"""ffmpeg as a process that frames are sent to.

Shapes: h rows, w columns.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from ..checks import cut
from ..whole_files import NO_ROOM

_SILENT = "; is the disk full?"  # it said nothing
_LAST_LINES = 3  # of what ffmpeg said; the last one alone is often "Conversion failed!"


class EncodingError(OSError):
    """ffmpeg failed; the message ends with what it wrote, and `reason` says why in a few words."""

    def __init__(self, path: Path, how: str, said: str) -> None:
        super().__init__(f"{cut(path)} could not be written whole: {how}{said}")
        unknown = how + said if said == _SILENT else how
        self.reason = next((text for number, text in NO_ROOM.items() if os.strerror(number) in said), unknown)


@contextmanager
def encoding(
    partial: Path, path: Path, size: tuple[int, int], fps: int, options: Sequence[str]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield what sends a frame "h w 3" in uint8 to ffmpeg, which writes a video in yuv420p.

    Args:
        partial: the file that is written.
        path: the file's name in errors.
        size: w and h.
        fps: frames per second.
        options: further arguments of the command: container, codec and their settings.
    Raises: OSError: ffmpeg cannot be run or has not written to the end; the message has what it said.
    """
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-f", "rawvideo", "-vcodec", "rawvideo"]
    command += ["-s", "{}x{}".format(*size), "-pix_fmt", "rgb24", "-r", str(fps), "-i", "-", "-an"]
    command += ["-pix_fmt", "yuv420p", "-v", "warning", *options, f"file:{partial}"]
    with tempfile.TemporaryFile() as log:
        # In a session of its own: Ctrl-C in a terminal is this process's to handle.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        frames = process.stdin
        assert frames is not None, "stdin is a pipe"

        def send(frame: np.ndarray) -> None:
            try:
                frames.write(np.ascontiguousarray(frame).data)
            except OSError as error:
                raise _failure(process, log, path) from error

        try:
            yield send
            try:
                frames.close()
            except OSError as error:
                raise _failure(process, log, path) from error
            if process.wait():
                raise _failure(process, log, path)
        finally:
            if process.poll() is None:
                process.kill()
            with suppress(OSError):  # what is left of the frames
                frames.close()
            process.wait()


def _failure(process: "subprocess.Popen[bytes]", log: IO[bytes], path: Path) -> OSError:
    """Return the error of a process that has ended, or closed its end of the pipe."""
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    said = f", after: {cut('; '.join(lines[-_LAST_LINES:]))}" if lines else _SILENT
    return EncodingError(path, f"ffmpeg {how}", said)
