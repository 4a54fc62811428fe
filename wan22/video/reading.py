"""Read video files with ffmpeg: when each frame is shown, and the frames themselves, in order, one at a time.

A file is never sought in: containers and codecs differ in where that leads. Frames that are not wanted are
decoded and dropped.

Shapes: h w rows, columns of an upright frame. Times are microseconds after a video's first frame.
"""

import re
import stat
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np

from ..checks import as_path, check_real, cut

MOST_PIXELS = 2**26  # of a frame: twice those of 8K
_SECOND = 10**6
# Two frames are equally near where containers' rounding of times alone would decide.
_NEARER = 2
_LAST_LINES = 3  # of what ffmpeg said
_ADDRESS = re.compile(r" @ 0x[0-9a-f]+")
# Plain files alone: a playlist must not lead elsewhere. Without a terminal's input, which ffmpeg would obey.
_INPUT = ["-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe,fd"]
# Every frame once, of the first video stream that is no cover picture.
_STREAM = ["-map", "0:V:0", "-fps_mode", "passthrough"]
_TICKS = ["-vf", f"settb=1/{_SECOND}", "-enc_time_base", f"1:{_SECOND}"]
# Bicubic chroma in full precision, and the same values on every machine.
_SCALER = "bicubic+accurate_rnd+full_chroma_int+bitexact"


@dataclass(frozen=True)
class VideoFile:
    """A video that was decoded once from its first to its last frame.

    Args:
        path: the file.
        width, height: pixels of an upright frame.
        times: when each frame is shown.
        duration: time from the first frame to the end of the last one.
    """

    path: Path
    width: int
    height: int
    times: tuple[int, ...] = field(repr=False)
    duration: int

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        return len(self.times) * _SECOND / self.duration

    def resampled(self, fps: float | None = None, source_fps: float | None = None) -> list[int]:
        """Return the numbers of the frames that show the video at a rate, in order; some may repeat.

        Frame k of the result is the one shown nearest to k/fps seconds, the earlier of two. There are as
        many as have their middle within the video.

        Args:
            fps: frames per second; None: every frame, once.
            source_fps: the video's own rate, in place of the times in the file.
        """
        count = len(self.times)
        if fps is None:
            return list(range(count))
        rate = Fraction(check_real("fps", fps, 0, above=True)).limit_denominator(1001)
        times: Sequence[Fraction | int] = list(accumulate(self.times, max))
        duration: Fraction | int = self.duration
        if source_fps is not None:
            own = Fraction(check_real("source_fps", source_fps, 0, above=True)).limit_denominator(1001)
            times, duration = [_SECOND * i / own for i in range(count)], _SECOND * count / own
        wanted = max(1, int(duration * rate / _SECOND + Fraction(1, 2)))
        return [_nearest(times, _SECOND * k / rate) for k in range(wanted)]


def _nearest(times: Sequence[Fraction | int], time: Fraction) -> int:
    """Return the number of the frame that is shown nearest to a time, the earlier of two."""
    after = bisect_right(times, time)
    if after == 0:
        return 0
    if after == len(times):
        return after - 1
    return after if times[after] - time < time - times[after - 1] - _NEARER else after - 1


def scan(source: str | Path) -> VideoFile:
    """Decode a video from its first to its last frame, without converting pixels; return when each is shown.

    It takes the time of decoding, and says what is wrong with a file before anything is done with its frames.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no video, is damaged or cut off, or its frames are too large.
    """
    path = as_path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {cut(path)}")
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device might never end
        raise ValueError(f"{cut(path)} is no regular file")
    lines, size = [], (0, 0)
    with _decoding(path, [*_TICKS, "-c:v", "wrapped_avframe", "-f", "framecrc", "-"]) as process:
        for line in process.lines():
            if line.startswith("#dimensions"):
                size = _size_of(line)
                if size[0] * size[1] > MOST_PIXELS:
                    raise ValueError(
                        f"{cut(path)} has frames of {size[0]}x{size[1]}; {MOST_PIXELS} pixels are the most"
                    )
            elif not line.startswith("#"):
                lines.append([int(part) for part in line.split(",")[2:4]])
        process.check()
    if not lines:
        raise ValueError(f"{cut(path)} holds no video: it has no frames")
    times = [time - lines[0][0] for time, _ in lines]
    last = lines[-1][1]
    if last <= 0:  # unknown: as long as the others are
        last = times[-1] // (len(times) - 1) if len(times) > 1 else _SECOND // 25
    return VideoFile(path, *size, tuple(times), max(1, max(times) + last))


def read_frames(video: VideoFile, numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield frames "h w 3" in uint8 by their numbers, which never decrease; equal ones repeat a frame.

    Decoding stops with the last one. Raises: ValueError: the file is not as it was scanned.
    """
    wanted = iter(numbers)
    number = next(wanted, None)
    if number is None:
        return
    shape = video.height, video.width, 3
    # The size, too: in some files it changes on the way.
    scaled = f"scale={video.width}:{video.height}:flags={_SCALER},format=rgb24"
    with _decoding(video.path, ["-vf", scaled, "-f", "rawvideo", "-"]) as process:
        for i in range(len(video.times)):
            data = process.output.read(shape[0] * shape[1] * 3)
            if len(data) < shape[0] * shape[1] * 3:
                process.check()
                raise ValueError(f"{cut(video.path)} has {i} frames now, and had {len(video.times)}")
            while number == i:
                yield np.frombuffer(data, np.uint8).reshape(shape)
                number = next(wanted, None)
            if number is None:
                return
    raise ValueError(f"{cut(video.path)} has no frame {number}; it has {len(video.times)}")


def _size_of(line: str) -> tuple[int, int]:
    """Return width and height of framecrc's line "#dimensions 0: 64x48"."""
    width, height = line.rpartition(" ")[2].split("x")
    return int(width), int(height)


# ---- ffmpeg as a process ----


class _Decoder:
    """A running ffmpeg: what it writes, and what it has said when it ends."""

    def __init__(self, path: Path, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
        assert process.stdout is not None, "stdout is a pipe"
        self.path, self.process, self.log, self.output = path, process, log, process.stdout

    def lines(self) -> Iterator[str]:
        """Yield the lines that it writes."""
        for line in self.output:
            yield line.decode("ascii", "replace").strip()

    def check(self) -> None:
        """Wait for its end; a ValueError has what it said of the file, if anything."""
        code = self.process.wait()
        self.log.seek(0)
        said = _ADDRESS.sub("", self.log.read().decode(errors="replace")).splitlines()
        if code or said:
            reason = cut("; ".join(said[:_LAST_LINES])) if said else f"ffmpeg ended with status {code}"
            raise ValueError(f"{cut(self.path)} cannot be read whole: {reason}")


@contextmanager
def _decoding(path: Path, options: Sequence[str]) -> Iterator[_Decoder]:
    """Run ffmpeg on a file's video until the caller has what it wants."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), *_INPUT, "-i", f"file:{path}", *_STREAM, *options]
    with (
        tempfile.TemporaryFile() as log,
        # In a session of its own: Ctrl-C in a terminal is this process's to handle.
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            yield _Decoder(path, process, log)
        finally:
            if process.poll() is None:
                process.kill()
