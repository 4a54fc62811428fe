"""Read the recipe from the metadata of a video or an image."""

import re
import subprocess
import threading
from pathlib import Path

from ..checks import as_path, cut
from .recipe import Recipe
from .schema import MOST_TEXT

PNG_KEY = "wan22"
EXIF_DESCRIPTION = 0x010E
EBML = b"\x1aE\xdf\xa3"  # with which Matroska's files begin, WebM included
MOST_SECONDS = 30  # for ffmpeg, which reads an MP4's header in a tenth of one


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a video, GIF, WebP or PNG written by `WanVideo.save`, under any name.

    Raises: FileNotFoundError: there is no such file. ValueError: the file carries no recipe.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {cut(path)}")
    with path.open("rb") as file:
        start = file.read(12)
    form = "mov" if start[4:8] == b"ftyp" else "matroska" if start[:4] == EBML else None
    text = _read_image(path) if form is None else _read_video(path, form)
    nothing = f"{cut(path)} carries no recipe of wan22"
    if not text:
        raise ValueError(f"{nothing}: its metadata was removed, or another program wrote it")
    try:
        return Recipe.from_json(text)
    except ValueError as error:
        raise ValueError(f"{nothing}: {cut(error.__cause__ or error)}") from error


def _read_video(path: Path, demuxer: str) -> str | None:
    """Return a video's comment, which ffmpeg prints with escapes."""
    import imageio_ffmpeg

    # Of this one format: others name further files and servers, which ffmpeg would open.
    form = ["-f", demuxer, "-protocol_whitelist", "file", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *form]
    nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=nowhere, stdout=pipe, stderr=nowhere) as process:
        alarm = threading.Timer(MOST_SECONDS, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            printed = process.stdout.read(4 * MOST_TEXT)
        finally:
            alarm.cancel()
            process.kill()
    output = printed.decode(errors="replace")
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", output, re.MULTILINE | re.IGNORECASE)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else None


def _read_image(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "GIF", "WEBP")) as image:
            # Of a PNG, the EXIF may come after the pixels, which are decoded then.
            own = image.info.get(PNG_KEY)
            text = own or image.getexif().get(EXIF_DESCRIPTION) or image.info.get(PNG_KEY)
            comment = image.info.get("comment", b"")
    except Exception:  # Pillow's readers raise whatever a broken file leads them to
        return None
    text = text or (comment.decode(errors="replace") if isinstance(comment, bytes) else comment)
    return text if isinstance(text, str) else None
