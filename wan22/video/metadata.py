"""Read the recipe from the metadata of a video or an image."""

import re
import subprocess
from pathlib import Path

from ..checks import as_path
from .recipe import Recipe

PNG_KEY = "wan22"
EXIF_DESCRIPTION = 0x010E


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in an MP4, GIF, WebP or PNG written by `WanVideo.save`, under any name.

    Raises: FileNotFoundError: there is no such file. ValueError: the file carries no recipe.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(12)
    is_mp4 = start[4:8] == b"ftyp"
    text = _read_mp4(path) if is_mp4 else _read_image(path)
    try:
        return Recipe.from_json(text or "")
    except ValueError as error:
        why = "its metadata was removed, or another program wrote it"
        raise ValueError(f"{path} carries no recipe of wan22: {why}") from error


def _read_mp4(path: Path) -> str | None:
    """Return an MP4's comment, which ffmpeg prints with escapes."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    output = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode()
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", output, re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else None


def _read_image(path: Path) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            exif = image.getexif().get(EXIF_DESCRIPTION)
            comment = image.info.get("comment", b"")
            text = image.info.get(PNG_KEY) or exif
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None
    return text or (comment.decode(errors="replace") if isinstance(comment, bytes) else comment)
