"""Videos side by side, each under a label, as one video or as one picture.

Shapes: t frames, h rows, w columns.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..checks import as_path, check_positive_int, shown
from . import sheets, writers
from .labels import labels as labels_of
from .labels import shared_caption
from .player import player
from .recipe import Recipe

SMALLEST = 160  # pixels of a cell's width: smaller videos are enlarged, by whole numbers
LABEL_LINES = 8  # of a cell; contact sheets have room for more


class Videos(Protocol):
    """What a call returns: one or several videos, a WanVideo."""

    recipe: Recipe
    seconds: float

    def as_uint8(self) -> list[np.ndarray]:
        """Return each video as "t h w 3"."""

    def as_arrays(self) -> list[np.ndarray]:
        """Return each video as "t h w 3" in its own dtype."""


def grid(videos: Sequence[Videos], labels: Sequence[str] | None = None, columns: int | None = None) -> "Grid":
    """Put videos side by side: over seeds or settings, exact beside fast.

    Args:
        videos: results of calls; each of several videos of one call gets a cell.
        labels: one per cell; None: what differs between the recipes, and the seconds that the calls took.
        columns: cells in a row; None: as many as make it about as wide as high.

    Raises: ValueError: there is no video, frames are latents, or labels and videos differ in number.
    """
    return Grid(videos, labels, columns)


class Grid:
    """Videos side by side; see `grid`. A notebook shows it as a player."""

    def __init__(
        self, videos: Sequence[Videos], labels: Sequence[str] | None = None, columns: int | None = None
    ) -> None:
        cells = [(video, i) for video in videos for i in range(len(video.recipe.seeds))]
        if not cells:
            raise ValueError("there are no videos; give at least one")
        self.recipes = [video.recipe.of(i) for video, i in cells]
        self.fps = max(recipe.fps for recipe in self.recipes)
        self._videos = [frames for video in videos for frames in video.as_uint8()]
        if labels is not None and len(labels) != len(cells):
            raise ValueError(f"labels={shown(labels)} has {len(labels)} for {len(cells)} videos")
        seconds = [video.seconds for video, _ in cells]
        self.labels = labels_of(self.recipes, seconds) if labels is None else list(labels)
        square = math.ceil(math.sqrt(len(cells)))
        self.columns = square if columns is None else check_positive_int("columns", columns)

    def __len__(self) -> int:
        return max(round(self.fps * len(v) / r.fps) for v, r in zip(self._videos, self.recipes, strict=True))

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames, "h w 3" in uint8: of a shorter video the last one stays, others are repeated."""
        size = self._cell_size()
        blocks = [sheets.text_block(label, size[0] + 2 * sheets.MARGIN, LABEL_LINES) for label in self.labels]
        rows = [range(i, min(i + self.columns, len(blocks))) for i in range(0, len(blocks), self.columns)]
        # Labels of one row have one height.
        heights = [max(len(blocks[i]) for i in row) for row in rows]
        width = min(self.columns, len(blocks)) * (size[0] + 2 * sheets.MARGIN)
        for t in range(len(self)):
            parts = []
            for row, height in zip(rows, heights, strict=True):
                cells = [self._cell(i, t, size, blocks[i], height) for i in row]
                line = np.concatenate(cells, axis=1)
                parts.append(np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))))
            yield np.concatenate(parts)

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        quality: int | None = None,
        crf: int | None = None,
    ) -> list[Path]:
        """Write the videos side by side to a file; arguments and errors are those of `WanVideo.save`.

        The file has no recipe.
        """
        path = as_path(path)
        writers.check_quality(path, quality, crf)
        writers.check_ending(path)
        (target,) = writers.numbered(path, 1, overwrite)
        count = writers.write(self.frames(), target, self.fps, None, quality, crf, overwrite)
        return writers.written_files(target, count)

    def contact_sheet(self, columns: int = 8, cell_width: int = 192, prompt: bool = True) -> Image.Image:
        """Draw one row per video: its label, and below it `columns` of its frames, first to last.

        Args:
            cell_width: pixels of each frame's width.
            prompt: whether a prompt that all share is above the rows; labels have those that differ.
        """
        heading = shared_caption(self.recipes, prompt)
        return sheets.contact_sheet(self._videos, self.labels, columns, cell_width, heading)

    def _repr_html_(self) -> str:
        return player(np.stack(list(self.frames())), self.fps, None)

    def _cell_size(self) -> tuple[int, int]:
        """Return the width and height in pixels of a cell, which each video fits into."""
        height, width = (max(video.shape[axis] for video in self._videos) for axis in (1, 2))
        factor = math.ceil(SMALLEST / width)
        return width * factor, height * factor

    def _cell(self, i: int, t: int, size: tuple[int, int], label: np.ndarray, height: int) -> np.ndarray:
        """Return a video's frame at a moment below its label."""
        video, (width, rows) = self._videos[i], size
        frame = video[min(t * self.recipes[i].fps // self.fps, len(video) - 1)]
        h, w, _ = frame.shape
        scale = min(width / w, rows / h)
        frame = sheets.scaled(frame, (round(w * scale), round(h * scale)))
        below, beside = rows - frame.shape[0], width - frame.shape[1]
        frame = np.pad(frame, ((0, below), (beside // 2, beside - beside // 2), (0, 0)))
        return np.concatenate(
            [np.pad(label, ((0, height - len(label)), (0, 0), (0, 0))), sheets.with_margin(frame)]
        )
