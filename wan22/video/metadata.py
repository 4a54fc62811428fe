"""Read the recipe out of a video's or an image's metadata, whichever format it is in."""

import re
import subprocess
from pathlib import Path

from .recipe import Recipe

PNG_KEY = "wan22"
EXIF_DESCRIPTION = 0x010E


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe that a file carries.

    Args:
        path: MP4, GIF, WebP or PNG that `WanVideo.save` wrote, whatever it is called now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it carries no recipe.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(12)
    is_mp4 = start[4:8] == b"ftyp"
    text = _of_mp4(path) if is_mp4 else _of_image(path)
    try:
        return Recipe.from_json(text or "")
    except ValueError as error:
        why = "its metadata was removed, or another program wrote it"
        raise ValueError(f"{path} carries no recipe of wan22: {why}") from error


def _of_mp4(path: Path) -> str | None:
    """Return the comment of an MP4, as ffmpeg writes it out."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    told = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode()
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", told, re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else None


def _of_image(path: Path) -> str | None:
    """Return the text that Pillow finds in a PNG, GIF or WebP."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            exif = image.getexif().get(EXIF_DESCRIPTION)
            comment = image.info.get("comment", b"")
            text = image.info.get(PNG_KEY) or exif
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None
    return text or (comment.decode(errors="replace") if isinstance(comment, bytes) else comment)
