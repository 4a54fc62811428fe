"""Images as people have them, made into the pixels that a video starts from.

Shapes: c colours, h w rows, columns. Sizes are (width, height) in pixels.
"""

import hashlib
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...checks import cut
from ...pictures import TIMEOUT, read_picture, upright_rgb
from .checks import describe

logger = logging.getLogger(__name__)

Fit = Literal["crop", "pad", "stretch"]
FITS = get_args(Fit)
Size = tuple[int, int]
T = TypeVar("T")

MIN_SIDE = 16  # pixels: one token's width; less has nothing to show
_HASHED = 64  # rows of pixels that are hashed at a time
MAX_ASPECT = 8  # long over short side, where the size follows the image
# Resampling and a slight overshoot of the values go together; other scales, such as 0 to 255, are far off.
OVERSHOOT = 0.25  # of what is 1 wide


@dataclass(frozen=True)
class Picture:
    """One image: RGB pixels "3 h w" in [-1, 1], float32 on the CPU; its path or URL, None if in memory."""

    pixels: torch.Tensor
    name: str | None = None

    @property
    def size(self) -> Size:
        """Width and height."""
        return self.pixels.shape[2], self.pixels.shape[1]

    @cached_property
    def mark(self) -> str:
        """A hash of the size and the pixels: the same in memory and in lossless files of any format."""
        digest = hashlib.sha256(f"{self.size}".encode())
        for rows in self.pixels.permute(1, 2, 0).split(_HASHED):  # a large picture is not copied whole
            digest.update(rows.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def to_pil(self) -> Image.Image:
        """Return the image in 8 bits; exactly the original of one that came in 8 bits."""
        values = self.pixels.add(1).mul_(127.5).round_().clamp_(0, 255).byte()
        return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


# ---- reading ----


def load_pictures(name: str, images: Any) -> list[Picture]:
    """Read one image or several; return them upright, transparency on white, [] for None.

    Args:
        name: the argument's name, for errors.
        images: None; or one image: a PIL image of any mode, a path, a URL (http, https, file), an array
            "h w", "h w 1", "h w 3" or "h w 4", or a tensor "c h w" of as many channels, each uint8 or
            floating in [0, 1], or in [-1, 1] if there are negative values, as in diffusers; or a list of
            images, or a batch "b h w c" or "b c h w".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or one side is below 16 pixels.
    """
    if images is None:
        return []
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    alone = not isinstance(images, (list, tuple))
    images = [images] if alone else images
    if not images:
        raise ValueError(f"{name} is an empty list; give at least one image")
    signed = any(map(_has_negative, images))
    if signed:
        logger.warning("%s has negative values: it is taken to be in [-1, 1], as in diffusers", name)
    return [load_picture(name if alone else f"{name}[{i}]", image, signed) for i, image in enumerate(images)]


def _has_negative(image: Any) -> bool:
    if isinstance(image, torch.Tensor):
        return image.is_floating_point() and image.numel() > 0 and bool((image < 0).any())
    return isinstance(image, np.ndarray) and image.dtype.kind == "f" and bool((image < 0).any())


def load_picture(name: str, image: Any, signed: bool = False) -> Picture:
    """Read one image; see `load_pictures`. `signed`: floating values are in [-1, 1]."""
    source = None
    if isinstance(image, Picture):  # read before
        return image
    if isinstance(image, (str, Path)):
        source, image = str(image), np.asarray(read_picture(name, image, TIMEOUT))
    if isinstance(image, Image.Image):
        try:
            image = np.asarray(upright_rgb(image))
        except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
            raise ValueError(f"{name} cannot be read: {cut(error)}") from error
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = image
    else:
        kinds = "a PIL image, a path, a URL, an array or a tensor"
        raise ValueError(f"{name} must be {kinds}, not {describe(image)}")
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        rule = "an array 'h w', 'h w 1', 'h w 3' or 'h w 4', or a tensor with the channels first"
        raise ValueError(f"{name} has shape {tuple(image.shape)}; it must be {rule}")
    picture = Picture(_to_pixels(name, array, signed), source)
    if min(picture.size) < MIN_SIDE:
        w, h = picture.size
        raise ValueError(f"{name} has {w}x{h} pixels; each side must have at least {MIN_SIDE}")
    return picture


def _to_pixels(name: str, array: np.ndarray, signed: bool = False) -> torch.Tensor:
    """Turn an array "h w c", uint8 or floating in [0, 1] or [-1, 1], into RGB "3 h w" in [-1, 1]."""
    # In place: a large image takes 12 bytes a pixel here.
    if array.dtype == np.uint8:
        values = array.astype(np.float32)
        values /= np.float32(255)
    elif array.dtype.kind == "f":
        values = array.astype(np.float32)
        if signed:
            values += 1
            values /= 2
    else:
        raise ValueError(f"{name} is {array.dtype}; it must be uint8, or floating in [0, 1]")
    x = torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1)
    # "not within" instead of "outside": NaN is not within either.
    if array.dtype != np.uint8 and not ((x >= -OVERSHOOT) & (x <= 1 + OVERSHOOT)).all():
        span = f"{array.min().item():g} to {array.max().item():g}"
        rule = "floating images must be in [0, 1], or in [-1, 1] with negative values; uint8 in 0 to 255"
        raise ValueError(f"{name} has values from {span}; {rule}")
    if x.shape[0] == 4:
        x = x[:3] * x[3:] + (1 - x[3:])  # on white
    x = x.sub_(0.5) if x.shape[0] == 3 else x.expand(3, -1, -1).sub(0.5)
    return x.div_(0.5)


# ---- sizes ----


def floor_size(size: Size, max_area: int, cell: Size) -> Size:
    """Return the most whole cells (one token each) of an image's aspect within an area: I2V-A14B's rule.

    Computed in whole numbers, where the official code's floating point makes 832x464 of an 832x480 image.
    Source: Wan2.2 wan/image2video.py, WanI2V.generate.
    """
    w, h = size
    columns = math.isqrt(max_area * w // (h * cell[0] ** 2))
    rows = math.isqrt(max_area * h // (w * cell[1] ** 2))
    return columns * cell[0], rows * cell[1]


def closest_size(size: Size, max_area: int, cell: Size) -> Size:
    """Return whole cells with the aspect nearest the image's, width first or height first: TI2V-5B's rule.

    Source: Wan2.2 wan/utils/utils.py, best_output_size.
    """
    ratio = size[0] / size[1]
    wide = (max_area * ratio) ** 0.5
    tall = max_area / wide
    w1 = int(wide // cell[0] * cell[0])
    h1 = int(max_area / max(w1, 1) // cell[1] * cell[1])
    h2 = int(tall // cell[1] * cell[1])
    w2 = int(max_area / max(h2, 1) // cell[0] * cell[0])
    if not (w1 and h1 and w2 and h2):
        return w1, h2

    def error(w: int, h: int) -> float:
        return max(ratio * h / w, w / (ratio * h))

    return (w1, h1) if error(w1, h1) < error(w2, h2) else (w2, h2)


def smallest_area(size_of: Callable[[int], Size]) -> int:
    """Return the smallest area for which a rule of sizes gives one that is not empty."""
    return bisect_left(range(2**62), True, key=lambda area: area > 0 and 0 not in size_of(area))


def check_aspect(name: str, picture: Picture) -> None:
    """Refuse an image too long for a video of its aspect."""
    w, h = picture.size
    if max(w, h) > MAX_ASPECT * min(w, h):
        rule = f"from 1:{MAX_ASPECT} to {MAX_ASPECT}:1; crop it, or give height and width"
        raise ValueError(
            f"{name} has {w}x{h} pixels; where the size follows the image, its aspect must be {rule}"
        )


# ---- fitting ----


def bicubic(picture: Picture, size: Size) -> Picture:
    """Resize without antialias, as the official code does for I2V-A14B: the values may overshoot."""
    if picture.size == size:
        return picture
    w, h = size
    return Picture(F.interpolate(picture.pixels[None], (h, w), mode="bicubic")[0], picture.name)


def lanczos(picture: Picture, size: Size) -> Picture:
    """Resize in 8 bits with Pillow, as the official code does for TI2V-5B."""
    if picture.size == size:
        return picture
    resized = picture.to_pil().resize(size, Image.Resampling.LANCZOS)
    return Picture(_to_pixels("image", np.asarray(resized)), picture.name)


def fit_picture(picture: Picture, size: Size, fit: Fit, resize: Any) -> Picture:
    """Bring an image to a size by `resize`, that is `bicubic` or `lanczos`.

    `fit`: "crop" covers the size and cuts the rest evenly; "pad" fits inside, on black; "stretch" scales each
    axis by itself.
    """
    if fit == "stretch" or picture.size == size:
        return resize(picture, size)
    (w0, h0), (w, h) = picture.size, size
    choose = max if fit == "crop" else min
    scale = choose(w / w0, h / h0)
    # As the official code rounds; the side that decides the scale comes out exact.
    scaled = resize(picture, (max(1, round(w0 * scale)), max(1, round(h0 * scale)))).pixels
    dy, dx = h - scaled.shape[1], w - scaled.shape[2]
    top, left = (d // 2 if d >= 0 else -(-d // 2) for d in (dy, dx))
    return Picture(F.pad(scaled, (left, dx - left, top, dy - top), value=-1.0), picture.name)


def one_per_video(pictures: Sequence[T], count: int) -> list[T]:
    """Spread images, or what is known of each, over videos: one serves all, several serve a prompt each."""
    return [pictures[i * len(pictures) // count] for i in range(count)]
