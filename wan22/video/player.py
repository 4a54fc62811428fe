"""Videos that play in a notebook. Shapes: t frames, h rows, w columns."""

import base64
import tempfile
from pathlib import Path

import numpy as np

from . import writers


def player(video: np.ndarray, fps: int, recipe: str | None) -> str:
    """Return an HTML5 player with a video "t h w 3" inside."""
    w = video.shape[2]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "clip.mp4")
        writers.write(video, file, fps, recipe)
        data = base64.b64encode(file.read_bytes()).decode()
    # Miniature videos are enlarged four times, with crisp pixels.
    width, style = (4 * w, "image-rendering: pixelated") if w <= 128 else (w, "max-width: 100%")
    return (
        f'<video controls loop muted autoplay width="{width}" style="{style}" '
        f'src="data:video/mp4;base64,{data}"></video>'
    )
