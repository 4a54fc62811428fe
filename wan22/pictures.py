"""Pictures from files and servers, read within limits: what is opened, and how much of it is decoded."""

import http.client
import math
import re
import stat
import threading
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .checks import as_path, cut, shown
from .extras import install_command
from .web import check_url, fetch, masked

if TYPE_CHECKING:
    from PIL.Image import Image

# Those that cameras, editors and the web use. Of Pillow's others, some run programs (EPS), some are decoded
# in Python, slowly. HEIF is read by pillow-heif, an extra.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000")
TYPES = ("image/", "application/octet-stream", "binary/octet-stream")  # how servers call them
MOST_BYTES = 2 * 10**8
# Decoding takes up to 16 bytes a pixel, of a PNG 5, and what follows 30. What has more than MOST_KEPT pixels
# is made smaller, by a whole number; a video has at most a few millions.
MOST_PIXELS, MOST_KEPT = 10**8, 25 * 10**6
MOST_SCANS = 200  # of a progressive JPEG: each passes over all pixels; encoders write about ten
TIMEOUT = 30  # seconds without a byte from a server; ten times as much for a whole picture

_WEB = re.compile(r"https?://", re.IGNORECASE)
_BLOCK = 2**20  # values that are converted at a time
_ROWS = 512  # that are converted and made smaller at a time
_OPENING = threading.Lock()  # warnings' filters are the process's
_HEIC = re.compile(rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)


def read_picture(name: str, source: str | Path, timeout: float = TIMEOUT) -> "Image":
    """Read a path or URL (http, https, file) as an upright RGB image of 8 bits, transparency on white.

    Args:
        name: the argument's name, for errors.
        timeout: seconds without a byte from a server.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture of FORMATS, is damaged or too large, or cannot be fetched.
    """
    place = masked(str(source))
    try:
        data = _fetched(str(source), timeout) if is_url(source) else _bytes_of(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no file {place}") from error
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
        how = "fetched" if is_url(source) else "read"
        raise ValueError(f"{name}: {place} cannot be {how}: {_reason(error)}") from error
    return decoded(f"{name}: {place}", data)


def is_url(source: str | Path) -> bool:
    """Return whether an image is on the web."""
    return isinstance(source, str) and _WEB.match(source) is not None


def decoded(where: str, data: bytes) -> "Image":
    """Return a file's bytes as an upright RGB image of 8 bits; a ValueError begins with `where`."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    if _HEIC.match(data) and not _can_read_heic():
        raise ValueError(f"{where} is HEIC; to read it: {install_command('heic')}")
    try:
        with _opened(data) as image:
            _check_decodable(image, data)
            image.load()
            _check_pixels(image)  # a GIF's frame may be larger than the file says it is
            return upright_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{where} is not an image that is read: {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise ValueError(f"{where} cannot be read: {_reason(error)}") from error


def upright_rgb(image: "Image") -> "Image":
    """Turn an image as its EXIF orientation says, and into 8-bit RGB, transparency on white.

    One of more than MOST_KEPT pixels is made smaller. Raises: ValueError: values are out of the mode's range.
    """
    from PIL import ExifTags, Image

    # Not ImageOps.exif_transpose: it writes all tags anew, and fails where any of them is broken.
    turn = _turn(image.getexif().get(ExifTags.Base.Orientation))
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        image = _in_eight_bits(image)
    image = _smaller(image) if image.width * image.height > MOST_KEPT else _in_colours(image)
    image = image if turn is None else image.transpose(turn)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _opened(data: bytes) -> "Image":
    """Return an image whose pixels are not decoded yet; its size is checked here, Pillow warns of it."""
    from PIL import Image

    formats = [name for name in FORMATS if name in Image.OPEN]
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(BytesIO(data), formats=formats)


def _can_read_heic() -> bool:
    """Return whether HEIC is read, by whichever plug-in; pillow-heif becomes one if it is installed."""
    from PIL import Image

    if "HEIF" not in Image.OPEN:
        try:
            import pillow_heif
        except ImportError:
            return False
        pillow_heif.register_heif_opener()
    return True


def _in_colours(image: "Image") -> "Image":
    """Return an image of 8 bits as RGB, or RGBA if it has transparency; without a copy where it is so."""
    if image.has_transparency_data:
        # Premultiplied modes have one way out.
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
        image = image if image.mode == straight else image.convert(straight)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _smaller(image: "Image") -> "Image":
    """Return an image with its sides divided by a whole number, in RGB or RGBA.

    Strip by strip: of a large image there is no other copy.
    """
    from PIL import Image

    factor = _factor(image)
    rows = factor * max(1, _ROWS // factor)
    size = -(-image.width // factor), -(-image.height // factor)
    result = Image.new("RGBA" if image.has_transparency_data else "RGB", size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_in_colours(strip).reduce(factor), (0, top // factor))
    return result


def _check_decodable(image: Any, data: bytes) -> None:
    """Refuse an image that would take too much memory or time to decode; let a JPEG be decoded smaller."""
    if image.format in ("JPEG", "MPO"):
        if (scans := data.count(b"\xff\xda")) > MOST_SCANS:
            raise ValueError(f"it has {scans} scans, a JPEG at most {MOST_SCANS}")
        if image.width * image.height > MOST_KEPT:
            factor = _factor(image)
            image.draft(None, (image.width // factor, image.height // factor))
    _check_pixels(image)


def _check_pixels(image: Any) -> None:
    most = MOST_PIXELS * 3 // 2 if image.format == "PNG" else MOST_PIXELS
    if image.width * image.height > most:
        size = f"{image.width}x{image.height} pixels"
        raise ValueError(f"it has {size}, more than {most // 10**6} million; make it smaller")


def _factor(image: Any) -> int:
    """Return by how much the sides are divided for at most MOST_KEPT pixels."""
    return math.ceil(math.sqrt(image.width * image.height / MOST_KEPT))


def _turn(orientation: Any) -> Any:
    """Return what brings an image upright, by its EXIF orientation."""
    from PIL.Image import Transpose as Turn

    turns = {
        2: Turn.FLIP_LEFT_RIGHT,
        3: Turn.ROTATE_180,
        4: Turn.FLIP_TOP_BOTTOM,
        5: Turn.TRANSPOSE,
        6: Turn.ROTATE_270,
        7: Turn.TRANSVERSE,
        8: Turn.ROTATE_90,
    }
    return turns.get(orientation)


def _in_eight_bits(image: Any) -> "Image":
    """Return a grey image of other depths in 8 bits."""
    import numpy as np
    from PIL import Image

    # 16 bits per pixel; "I" is how some of Pillow's readers hold them. "F" is 0 to 1, as in arrays.
    values, top = np.asarray(image), 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        rule = f"must have values from 0 to {top:g}, not {values.min():g} to {values.max():g}"
        raise ValueError(f"an image of mode {shown(image.mode)} {rule}")
    flat, grey = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, flat.size, _BLOCK):  # a whole one in float64 would take 8 bytes a pixel
        part = slice(start, start + _BLOCK)
        grey[part] = (flat[part].astype(np.float64) / top * 255).round()
    return Image.fromarray(grey.reshape(values.shape))


def _bytes_of(source: str | Path) -> bytes:
    """Return what a file holds; an OSError or ValueError refuses what is no file, or a very large one."""
    text = str(source)
    if text[:7].lower() == "file://":
        url = urlsplit(text)
        if url.netloc.lower() not in ("", "localhost"):
            raise ValueError("it is a file on another machine")
        source = url2pathname(url.path)
    path = as_path(source)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device might never end
        raise ValueError("it is a folder" if path.is_dir() else "it is no regular file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1) if status.st_size <= MOST_BYTES else b""
    if status.st_size > MOST_BYTES or len(data) > MOST_BYTES:
        raise ValueError(f"it has {max(status.st_size, len(data))} bytes, a picture at most {MOST_BYTES}")
    return data


def _fetched(url: str, timeout: float) -> bytes:
    """Return what a server sends; an OSError, ValueError or HTTPException refuses what is no picture."""
    check_url("the URL", url)
    answer = fetch(url, silence=timeout, total=10 * timeout, most=MOST_BYTES)
    if answer.status != 200:
        raise ValueError(f"the server answered {answer.status} {answer.reason}")
    kind = answer.headers.get("content-type", "image/")
    if not kind.strip().lower().startswith(TYPES):
        raise ValueError(f"it is not an image: the server calls it {shown(kind)}")
    return answer.body


def _reason(error: BaseException) -> str:
    return cut(error) or type(error).__name__
