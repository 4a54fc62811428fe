"""The result of a call: frames, frame rate, and the recipe that made them.

Shapes: b videos, t frames, h rows, w columns, c colours.
"""

import base64
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from ..checks import as_path
from ..progress import progress_bar
from . import writers
from .recipe import Recipe

OutputType = Literal["np", "pil", "pt", "latent", "stream"]
OUTPUT_TYPES = get_args(OutputType)


@dataclass(repr=False)
class WanVideo(BaseOutput):
    """Generated videos. A notebook shows them as players.

    Args:
        frames: "np": float32 array "b t h w c" in [0, 1]; "pt": the same as a tensor "b t c h w"; "pil": a
            list of frames per video; "latent": normalised latents, a tensor "b c t h w".
        fps: frames per second of the checkpoint.
        recipe: all settings of the call.
    """

    frames: Any
    fps: int
    recipe: Recipe
    # Not a field: of several ranks that make a video together, one writes the files.
    writes = True

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        quality: int | None = None,
        crf: int | None = None,
    ) -> list[Path]:
        """Write each video to a file, with the recipe in its metadata.

        Args:
            path: file whose ending sets the format: .mp4 (H.264), .gif, .webp, .png (one file per frame), or
                .npy (the values unchanged, without a recipe). Several videos get a number before the ending.
            overwrite: whether existing files are replaced.
            quality: 1 to 100, for .mp4 and .webp; default 90.
            crf: H.264's scale for .mp4 instead of quality, 0 (lossless) to 51.

        Returns: the files; none on the ranks after the first.

        Raises:
            ValueError: the ending is unknown, the quality does not suit it, or the frames are latents.
            FileExistsError: a file exists and overwrite is False.
            OSError: a file cannot be written; the frames remain and can be saved elsewhere.
        """
        path = as_path(path)
        writers.check_quality(path, quality, crf)
        ending = writers.check_ending(path)
        if not self.writes:
            return []
        videos = self._values() if ending == ".npy" else self.as_uint8()
        paths = writers.numbered(path, len(videos), overwrite)
        files = []
        with progress_bar(total=sum(map(len, videos)), desc="saving", unit="frame", leave=False) as bar:
            for i, (video, target) in enumerate(zip(videos, paths, strict=True)):
                text = self.recipe.of(i).to_json()
                frames = _counted(video, bar)
                count = writers.write(frames, target, self.fps, text, quality, crf, overwrite)
                files += writers.written_files(target, count)
        return files

    def contact_sheet(self, columns: int = 8, cell_width: int = 192) -> Image.Image:
        """Draw one row per video: `columns` of its frames, first to last, each `cell_width` pixels wide."""
        rows = []
        for video in self.as_uint8():
            _, h, w, _ = video.shape
            size = cell_width, max(1, round(h * cell_width / w))
            # Integer multiples keep the pixels of miniature videos crisp.
            resample = Image.Resampling.NEAREST if cell_width % w == 0 else Image.Resampling.LANCZOS
            picks = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
            cells = [np.asarray(Image.fromarray(video[i]).resize(size, resample)) for i in picks]
            rows.append(np.concatenate([np.pad(cell, ((2, 2), (2, 2), (0, 0))) for cell in cells], axis=1))
        return Image.fromarray(np.concatenate(rows))

    def as_uint8(self) -> list[np.ndarray]:
        """Return each video as "t h w c" in 0 to 255, truncated as in the official code; not for latents."""
        return [values if values.dtype == np.uint8 else to_uint8(values) for values in self._values()]

    def _values(self) -> list[np.ndarray]:
        """Return each video as "t h w c" in its own dtype."""
        if isinstance(self.frames, list):
            return [np.stack([np.asarray(frame) for frame in video]) for video in self.frames]
        if isinstance(self.frames, torch.Tensor):
            if self.frames.shape[1:3] != (self.recipe.num_frames, 3):
                raise ValueError(
                    "the frames are latents (output_type='latent'); decode them with pipe.decode first"
                )
            return list(self.frames.permute(0, 1, 3, 4, 2).float().cpu().numpy())
        return list(self.frames)

    def __repr__(self) -> str:
        return f"WanVideo({self.recipe})"

    def _repr_html_(self) -> str:
        """Return players with the videos inside, for notebooks."""
        try:
            videos = self.as_uint8()
        except ValueError:
            return f"<p>latents of {self.recipe}</p>"
        return "\n".join(
            player(video, self.fps, self.recipe.of(i).to_json()) for i, video in enumerate(videos)
        )


class WanStream:
    """One video's frames "h w 3" in uint8, decoded while they are iterated over, once.

    With several ranks the first one gets the frames; the others must iterate as well, and get none.
    """

    writes = True

    def __init__(self, frames: Iterator[np.ndarray], fps: int, recipe: Recipe) -> None:
        self._frames, self.fps, self.recipe = frames, fps, recipe

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._frames

    def __len__(self) -> int:
        return self.recipe.num_frames

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        quality: int | None = None,
        crf: int | None = None,
    ) -> list[Path]:
        """Write the frames as they are decoded; .mp4 and .png keep only a few in memory.

        See `WanVideo.save` for arguments and errors. After an error the frames cannot be saved again.
        """
        path = as_path(path)
        writers.check_ending(path)
        writers.check_quality(path, quality, crf)
        if not self.writes:
            deque(self._frames, maxlen=0)  # decodes this rank's part
            return []
        (target,) = writers.numbered(path, 1, overwrite)
        text = self.recipe.to_json()
        count = writers.write(self._frames, target, self.fps, text, quality, crf, overwrite)
        return writers.written_files(target, count)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Scale [0, 1] to 0 to 255, truncated. Source: Wan2.2 wan/utils/utils.py, save_video."""
    return (frames.clip(0, 1) * np.float32(255)).astype(np.uint8)


def player(video: np.ndarray, fps: int, recipe: str) -> str:
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


def _counted(video: np.ndarray, bar: Any) -> Iterator[np.ndarray]:
    for frame in video:
        yield frame
        bar.update()
