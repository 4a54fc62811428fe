"""Frames and text on one picture. Shapes: t frames, h rows, w columns; uint8, the colours last."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

MARGIN = 2  # black pixels around each frame
FONT_SIZE, SPACING, INDENT = 14, 4, 4  # pixels
MOST_LINES = 16  # of a text
NARROWEST = 320  # pixels of a sheet with text
COLOUR = (225, 225, 225)
# Fonts with other characters than that of Pillow, which has ASCII: of Linux distributions, Windows, macOS.
FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("DroidSansFallbackFull.ttf", "msyh.ttc", "simsun.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("Arial Unicode.ttf", "arial.ttf", "Arial.ttf", "NotoSans-Regular.ttf", "DejaVuSans.ttf"),
)
_UNASSIGNED = "\U0010fffe"  # which fonts draw as what they lack


def contact_sheet(
    videos: Sequence[np.ndarray], texts: Sequence[str], columns: int, cell_width: int, heading: str = ""
) -> Image.Image:
    """Draw one row per video "t h w 3": its text, if any, and below it frames, first to last.

    Args:
        texts: one per video, or none.
        columns: frames of a row, at most.
        cell_width: pixels of a frame's width.
        heading: text above all rows.
    """
    rows = []
    for video in videos:
        _, h, w, _ = video.shape
        size = cell_width, max(1, round(h * cell_width / w))
        picks = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        cells = [with_margin(scaled(video[i], size)) for i in picks]
        rows.append(np.concatenate(cells, axis=1))
    width = max(NARROWEST if heading or texts else 0, *(row.shape[1] for row in rows))
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    parts = [text_block(heading, width)] if heading else []
    for row, text in zip(rows, texts or [""] * len(rows), strict=True):
        parts += [text_block(text, width), row] if text else [row]
    return Image.fromarray(np.concatenate(parts))


def scaled(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a frame at a size (width, height)."""
    # Integer multiples keep the pixels of miniature videos crisp.
    resample = Image.Resampling.NEAREST if size[0] % frame.shape[1] == 0 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize(size, resample))


def with_margin(frame: np.ndarray) -> np.ndarray:
    """Return a frame "h w 3" with a black margin."""
    return np.pad(frame, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))


def text_block(text: str, width: int, lines: int = MOST_LINES) -> np.ndarray:
    """Return a text, wrapped and as high as it needs, light on black: "h w 3" of a width in pixels.

    If it takes more lines, the end of its first line, such as a long prompt, is left out, which "…" says.
    """
    font, width_of_text = _font(frozenset(f"{text}…")), width - 2 * INDENT
    first, *others = (_wrapped(line, font, width_of_text) for line in text.split("\n"))
    rest = [line for wrapped in others for line in wrapped][: lines - 1]
    most = lines - len(rest)
    if len(first) > most:
        first = [*first[: most - 1], _cut(first[most - 1], font, width_of_text)]
    wrapped = first + rest
    step = FONT_SIZE + SPACING
    image = Image.new("RGB", (width, len(wrapped) * step + 2 * SPACING))
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(wrapped):
        line = line.replace("\N{NO-BREAK SPACE}", " ")  # for which Pillow's font has no form
        draw.text((INDENT, SPACING + i * step), line, fill=COLOUR, font=font)
    return np.asarray(image)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines, between words, or within one that is wider than a line."""
    lines, line = [], ""
    for word in filter(None, text.split(" ")):  # not at spaces that hold together
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:  # also of scripts without spaces
            most = _fitting(word, font, width)
            lines.append(word[:most])
            word = word[most:]
        line = word
    return [*lines, line]


def _fitting(text: str, font: Any, width: int) -> int:
    """Return the number of characters that fit into a width, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _cut(line: str, font: Any, width: int) -> str:
    """Return a line with "…" at its end, shortened to have room for it."""
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


@lru_cache(maxsize=64)
def _font(characters: frozenset[str]) -> Any:
    """Return Pillow's font, or of those here the one that lacks the fewest of some characters."""
    own: Any = ImageFont.load_default(FONT_SIZE)
    best, lacking = own, _lacking(own, characters)
    for name in FONTS:
        if not lacking:
            break
        try:
            other = ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
        if (count := _lacking(other, characters)) < lacking:
            best, lacking = other, count
    if lacking:
        message = "no font here has %d of the characters of a caption, such as %s; install one that does"
        logger.warning(message, lacking, sorted(c for c in characters if _lacking(best, frozenset(c)))[0])
    return best


def _lacking(font: Any, characters: frozenset[str]) -> int:
    """Return how many of some characters a font has no form for."""
    absent = bytes(font.getmask(_UNASSIGNED))
    return sum(bytes(font.getmask(c)) == absent for c in characters if not c.isspace())
