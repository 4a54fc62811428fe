"""Write frames as videos, GIF, WebP, PNGs or NumPy arrays. A file is written whole or not at all.

Shapes: t frames, h rows, w columns.
"""

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_positive_int, cut, shown
from ..whole_files import whole_file, whole_series
from .ffmpeg import encoding
from .metadata import EXIF_DESCRIPTION, PNG_KEY

logger = logging.getLogger(__name__)

QUALITY, BEST_CRF = 90, 0
# The longest argument of a command on Linux.
_LONGEST_ARGUMENT = 128 * 1024 - 16

Frames = Iterable[np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """How ffmpeg writes a container: arguments of its command, and the codec's constant rate factor."""

    muxer: str
    codec: tuple[str, ...]
    worst_crf: int
    muxing: tuple[str, ...] = ()

    def crf_of(self, quality: int) -> int:
        """Return the constant rate factor for a quality of 1 to 100: of H.264 16 for 90, 12 for 100."""
        return round(self.worst_crf * (1 - quality * 0.39 / 51))


_H264 = ("-vcodec", "libx264")
# The index comes first, so that a video plays while it loads.
_INDEX_FIRST = ("-movflags", "+faststart")
ENCODINGS = {
    ".mp4": Encoding("mp4", _H264, 51, _INDEX_FIRST),
    # QuickTime's own comment holds 64 kB, these tags any length.
    ".mov": Encoding("mov", _H264, 51, ("-movflags", "+faststart+use_metadata_tags")),
    ".mkv": Encoding("matroska", _H264, 51),
    # Without a bit rate of 0, VP9 heeds the rate factor as a limit alone.
    ".webm": Encoding("webm", ("-vcodec", "libvpx-vp9", "-b:v", "0", "-row-mt", "1", "-cpu-used", "4"), 63),
}


def write(
    frames: Frames,
    path: Path,
    fps: int,
    recipe: str | None = None,
    quality: int | None = None,
    crf: int | None = None,
    replace: bool = True,
) -> int:
    """Write frames in the format of the file's ending, and return their number.

    Args:
        frames: uint8 "h w 3", one at a time; for .npy any dtype.
        path: file; a .png gets the frame's number before its ending.
        fps: frames per second.
        recipe: text for the metadata.
        quality, crf: as in `WanVideo.save`.
        replace: whether a file of this name is replaced, one that appears meanwhile, too.
    Raises: ValueError: the ending or the quality is wrong, or there are no frames. OSError: writing fails;
        a FileExistsError: there is a file, and `replace` is False.
    """
    ending = check_ending(path)
    quality, crf = check_quality(path, quality, crf)
    return WRITERS[ending](frames, path, fps, recipe, quality, crf, replace=replace)


def check_ending(path: Path) -> str:
    """Return a file's ending in lower case, or raise ValueError if no format has it."""
    if (ending := path.suffix.lower()) not in WRITERS:
        raise ValueError(f"{cut(path)} must end in {', '.join(WRITERS)}; say {cut(path.with_suffix('.mp4'))}")
    return ending


def check_quality(path: Path, quality: Any, crf: Any) -> tuple[int | None, int | None]:
    """Return quality and crf as int; refuse one out of range, or for a format that has none."""
    ending = path.suffix.lower()
    encoding = ENCODINGS.get(ending)
    if crf is not None and encoding is None:
        raise ValueError(f"crf={shown(crf)} is for {', '.join(ENCODINGS)}, not {ending}")
    if quality is not None and ending not in (*ENCODINGS, ".webp"):
        raise ValueError(
            f"quality={shown(quality)} is for {', '.join(ENCODINGS)} and .webp; {ending} has none"
        )
    if quality is not None and crf is not None:
        raise ValueError("quality and crf are both given; give one")
    if quality is not None:
        return check_positive_int("quality", quality, most=100), None
    if crf is None or encoding is None:
        return None, None
    return None, check_positive_int("crf", crf, least=BEST_CRF, most=encoding.worst_crf)


def numbered(path: Path, count: int, overwrite: bool) -> list[Path]:
    """Return a file name for each of several videos, with a number before the ending.

    Raises: FileExistsError: a file exists and overwrite is False.
    """
    paths = [path] if count == 1 else [numbered_name(path, i) for i in range(count)]
    taken = [file for name in paths for file in existing_files(name)]
    if taken and not overwrite:
        if len(taken) == 1:
            raise FileExistsError(f"{taken[0]} exists; overwrite=True replaces it")
        raise FileExistsError(f"{taken[0]} and {len(taken) - 1} more exist; overwrite=True replaces them")
    return paths


def numbered_name(path: Path, index: int) -> Path:
    """Return the file name of one of several videos."""
    return path.with_stem(f"{path.stem}-{index + 1}")


def existing_files(path: Path) -> list[Path]:
    """Return the files that a video of this name would replace; for .png, all its frames."""
    if path.suffix.lower() != ".png":
        return [path] if path.exists() else []
    frame = re.compile(rf"{re.escape(path.stem)}-\d{{4,}}{re.escape(path.suffix)}")
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in found if frame.fullmatch(file.name))


def written_files(path: Path, count: int) -> list[Path]:
    """Return the files of a video with `count` frames."""
    return [_frame_name(path, i) for i in range(count)] if path.suffix.lower() == ".png" else [path]


# ---- the formats ----


def write_encoded(
    frames: Frames,
    path: Path,
    fps: int,
    recipe: str | None = None,
    quality: int | None = None,
    crf: int | None = None,
    *,
    replace: bool = True,
) -> int:
    """Write H.264, or VP9 for .webm, in yuv420p; see `write`.

    Odd sizes repeat the last row or column, as yuv420p has one colour per 2 x 2 pixels.
    """
    import imageio_ffmpeg

    first, frames = _first(frames)
    h, w, _ = first.shape
    form = ENCODINGS[path.suffix.lower()]
    # The tags name the conversion from RGB; without them players guess by size.
    filters = [
        "scale=out_color_matrix=bt709:out_range=tv",
        "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv",
    ]
    rate = form.crf_of(quality or QUALITY) if crf is None else crf
    options = [*form.codec, "-crf", str(rate), "-vf", ",".join(filters)]
    options += [*form.muxing, "-map_metadata", "-1"]
    if recipe is not None and len(recipe) < _LONGEST_ARGUMENT - len("comment="):
        options += ["-metadata", f"comment={recipe}"]
    elif recipe is not None:
        message = "the recipe has %d bytes, too many for %s; it is left out"
        logger.warning(message, len(recipe), path.suffix.lower())
    options += ["-f", form.muxer]
    count = 0
    with whole_file(path, replace) as partial:
        with encoding(partial, path, (w + w % 2, h + h % 2), fps, options) as send:
            for frame in frames:
                send(_even(frame))
                count += 1
        # What ffmpeg returns does not always tell whether it wrote to the end.
        found = 0
        with suppress(RuntimeError):
            if partial.stat().st_size:
                found, _ = imageio_ffmpeg.count_frames_and_secs(f"file:{partial}")
        if found != count:
            raise OSError(f"{path} could not be written whole; is the disk full?")
    return count


def write_gif(
    frames: Frames, path: Path, fps: int, recipe: str | None = None, *_: Any, replace: bool = True
) -> int:
    """Write an animated GIF of 256 colours a frame, at the average rate of `fps`; see `write`."""
    # GIF counts in hundredths of a second: durations alternate so that the whole has the right length.
    comment = {} if recipe is None else {"comment": recipe.encode()}
    start = lambda i: round(100 * i / fps) * 10  # noqa: E731
    return _write_animation(frames, path, replace, start, format="GIF", **comment)


def write_webp(
    frames: Frames,
    path: Path,
    fps: int,
    recipe: str | None = None,
    quality: int | None = None,
    *_: Any,
    replace: bool = True,
) -> int:
    """Write an animated WebP; see `write`."""
    from PIL import Image

    exif = Image.Exif()
    if recipe is not None:
        exif[EXIF_DESCRIPTION] = recipe
    start = lambda i: round(1000 * i / fps)  # noqa: E731
    return _write_animation(
        frames, path, replace, start, format="WEBP", quality=quality or QUALITY, exif=exif
    )


def write_png(
    frames: Frames, path: Path, fps: int, recipe: str | None = None, *_: Any, replace: bool = True
) -> int:
    """Write one PNG per frame, clip-0001.png, clip-0002.png, …, each with the recipe; see `write`.

    They get their names together, when all are written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    if recipe is not None:
        text.add_text(PNG_KEY, recipe)
    count = 0
    with whole_series(replace) as temporary:
        for count, frame in enumerate(_first(frames)[1], start=1):
            partial = temporary(_frame_name(path, count - 1))
            Image.fromarray(frame).save(partial, format="PNG", pnginfo=text)
    if longer := sorted(set(existing_files(path)).difference(written_files(path, count))):
        # Not removed: they may be the user's pictures.
        logger.warning("%s and what follows it is not of this video, which has %d frames", longer[0], count)
    return count


def write_npy(frames: Frames, path: Path, *_: Any, replace: bool = True) -> int:
    """Write one NumPy array "t h w 3" with the values unchanged; see `write`."""
    array = np.stack(list(_first(frames)[1]))
    with whole_file(path, replace) as partial, partial.open("wb") as file:
        try:
            np.save(file, array)
        except OSError as error:  # NumPy's message names an element, not the reason
            raise OSError(error.errno, f"{path} could not be written whole; is the disk full?") from error
    return len(array)


WRITERS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(ENCODINGS, write_encoded),
    ".gif": write_gif,
    ".webp": write_webp,
    ".png": write_png,
    ".npy": write_npy,
}


def _write_animation(
    frames: Frames, path: Path, replace: bool, start: Callable[[int], int], **options: Any
) -> int:
    """Write an animation with Pillow; `start` gives the millisecond at which a frame begins."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in _first(frames)[1]]
    durations = [start(i + 1) - start(i) for i in range(len(images))]
    with whole_file(path, replace) as partial:
        images[0].save(
            partial, save_all=True, append_images=images[1:], duration=durations, loop=0, **options
        )
    return len(images)


def _first(frames: Frames) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Return the first frame, and an iterator over all of them."""
    iterator = iter(frames)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError("there are no frames to write") from None
    return first, itertools.chain([first], iterator)


def _even(frame: np.ndarray) -> np.ndarray:
    h, w, _ = frame.shape
    return np.pad(frame, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge") if h % 2 or w % 2 else frame


def _frame_name(path: Path, index: int) -> Path:
    return path.with_stem(f"{path.stem}-{index + 1:04d}")
