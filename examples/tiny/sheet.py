"""Lay clips out on one picture, to look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    clips: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    columns: int = 6,
    zoom: int = 2,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Lay clips out as rows: the caption on the left, then frames from first to last.

    Args:
        clips: uint8 RGB, "n t h w c".
        captions: a text per clip.
        columns: frames per clip, evenly spaced in time.
        zoom: enlargement, without smoothing.
        notes: an optional second text per clip, printed in red.
    Returns: the sheet.
    """
    h, w = (side * zoom for side in clips[0].shape[1:3])
    gap, text_width = 4, 176
    sheet = Image.new("RGB", (text_width + columns * (w + gap), len(clips) * (h + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (clip, text) in enumerate(zip(clips, captions, strict=True)):
        top = gap + row * (h + gap)
        lines = _wrap(text, pen, font, text_width - 2 * gap)
        pen.multiline_text((gap, top), "\n".join(lines), "black", font)
        if notes:
            below = top + 18 * len(lines) + gap
            note = _wrap(notes[row], pen, font, text_width - 2 * gap)
            pen.multiline_text((gap, below), "\n".join(note), (200, 0, 0), font)
        for column, t in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            frame = Image.fromarray(clip[t]).resize((w, h), Image.Resampling.NEAREST)
            left = text_width + column * (w + gap)
            pen.rectangle((left - 1, top - 1, left + w, top + h), outline=(190, 190, 190))
            sheet.paste(frame, (left, top))
    return sheet


def _wrap(text: str, pen: ImageDraw.ImageDraw, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
