"""The result of a call: frames, frame rate, and the recipe that made them.

Shapes: b videos, t frames, h rows, w columns, c colours.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from ..checks import as_path
from ..notebooks import table
from ..progress import progress_bar
from . import writers
from .player import player
from .recipe import Recipe

if TYPE_CHECKING:
    from .compare import Comparison

OutputType = Literal["np", "pil", "pt", "latent", "stream"]
OUTPUT_TYPES = get_args(OutputType)


@dataclass(repr=False, eq=False)
class WanVideo(BaseOutput):
    """Generated videos. A notebook shows them as players.

    Two are equal if their frames, frame rates and recipes are.

    Args:
        frames: "np": float32 array "b t h w c" in [0, 1]; "pt": the same as a tensor "b t c h w"; "pil": a
            list of frames per video; "latent": normalised latents, a tensor "b c t h w".
        fps: frames per second of the checkpoint.
        recipe: all settings of the call.
    """

    frames: Any
    fps: int
    recipe: Recipe
    # Not fields. Of several ranks that make a video together, one writes the files.
    writes = True
    seconds = math.nan  # that the call took; NaN if nobody knows

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        quality: int | None = None,
        crf: int | None = None,
        recipe: bool = True,
        prompt: bool = True,
    ) -> list[Path]:
        """Write each video to a file, with the recipe in its metadata, which has no folders of this machine.

        Args:
            path: file whose ending sets the format: .mp4, .mov or .mkv (H.264), .webm (VP9), .gif, .webp,
                .png (one file per frame), or .npy (the values unchanged, without a recipe). Several videos
                get a number before the ending.
            overwrite: whether existing files are replaced.
            quality: 1 to 100, for these videos and .webp; default 90.
            crf: the codec's scale instead of quality, 0 (best) to 51; of .webm to 63.
            recipe: whether the file gets the recipe. Without it, it has no metadata of wan22.
            prompt: whether the recipe has the prompts. Without them, `reproduce` has to be given the prompt.

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
        videos = self.as_arrays() if ending == ".npy" else self.as_uint8()
        paths = writers.numbered(path, len(videos), overwrite)
        files = []
        total = sum(map(len, videos))
        with progress_bar(total=total, desc="saving", unit="frame", leave=False, delay=1) as bar:
            for i, (video, target) in enumerate(zip(videos, paths, strict=True)):
                text = _metadata(self.recipe.of(i), recipe, prompt)
                frames = _counted(video, bar)
                count = writers.write(frames, target, self.fps, text, quality, crf, overwrite)
                files += writers.written_files(target, count)
        return files

    def contact_sheet(
        self, columns: int = 8, cell_width: int = 192, *, caption: bool = True, prompt: bool = True
    ) -> Image.Image:
        """Draw one row per video: `columns` of its frames, first to last, each `cell_width` pixels wide.

        Args:
            caption: whether prompt, seed, size, steps and the time that the call took are above each row.
            prompt: whether the prompt is among them.
        """
        from . import labels, sheets

        videos = self.as_uint8()
        recipes = [self.recipe.of(i) for i in range(len(videos))] if caption else []
        texts = [labels.caption(recipe, self.seconds, prompt) for recipe in recipes]
        return sheets.contact_sheet(videos, texts, columns, cell_width)

    def compare(self, other: "WanVideo", labels: Sequence[str] | None = None) -> "Comparison":
        """Put another result beside this one: what differs in the recipes, in the frames, in the time.

            print(exact.compare(fast))  # settings, PSNR, largest difference
            exact.compare(fast).save("both.mp4")

        `labels` are in place of what differs in the recipes. For more than two see `wan22.grid`.

        Raises: ValueError: they have different numbers of videos, or frames are latents.
        """
        from .compare import Comparison

        return Comparison(self, other, labels)

    def __eq__(self, other: object) -> bool:
        """Whether frames, frame rate and recipe are equal; "np" and "pt" have the same frames."""
        if not isinstance(other, WanVideo):
            return NotImplemented
        if (self.fps, self.recipe) != (other.fps, other.recipe):
            return False
        mine, theirs = self._comparable(), other._comparable()
        return len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs))

    def __ne__(self, other: object) -> bool:
        return not self == other  # a dict's own compares the frames

    def __hash__(self) -> int:
        return hash((self.fps, self.recipe))

    def as_uint8(self) -> list[np.ndarray]:
        """Return each video as "t h w c" in 0 to 255, truncated as in the official code; not for latents."""
        return [values if values.dtype == np.uint8 else to_uint8(values) for values in self.as_arrays()]

    def as_arrays(self) -> list[np.ndarray]:
        """Return each video as "t h w c" in its own dtype: uint8 of "pil", or float32; not for latents."""
        if isinstance(self.frames, list):
            return [np.stack([np.asarray(frame) for frame in video]) for video in self.frames]
        if isinstance(self.frames, torch.Tensor):
            if self._holds_latents():
                raise ValueError(
                    "the frames are latents (output_type='latent'); decode them with pipe.decode first"
                )
            return list(self.frames.permute(0, 1, 3, 4, 2).float().cpu().numpy())
        return list(self.frames)

    def _comparable(self) -> list[np.ndarray]:
        """Return each video's values, or its latents, as arrays."""
        latents = isinstance(self.frames, torch.Tensor) and self._holds_latents()
        return list(self.frames.float().cpu().numpy()) if latents else self.as_arrays()

    def _holds_latents(self) -> bool:
        return tuple(self.frames.shape[1:3]) != (self.recipe.num_frames, 3)

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

    def __repr__(self) -> str:
        return f"WanStream({self.recipe})"

    def _repr_html_(self) -> str:
        """Return what is streamed, for notebooks; showing it decodes nothing."""
        rows = [
            ("frames", "decoded when they are asked for, once: for frame in stream, or stream.save(path)")
        ]
        return table("WanStream", [*rows, ("video", str(self.recipe))])

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        quality: int | None = None,
        crf: int | None = None,
        recipe: bool = True,
        prompt: bool = True,
    ) -> list[Path]:
        """Write the frames as they are decoded; videos and .png keep only a few in memory.

        See `WanVideo.save` for arguments and errors. After an error the frames cannot be saved again.
        """
        path = as_path(path)
        writers.check_ending(path)
        writers.check_quality(path, quality, crf)
        if not self.writes:
            deque(self._frames, maxlen=0)  # decodes this rank's part
            return []
        (target,) = writers.numbered(path, 1, overwrite)
        text = _metadata(self.recipe, recipe, prompt)
        count = writers.write(self._frames, target, self.fps, text, quality, crf, overwrite)
        return writers.written_files(target, count)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Scale [0, 1] to 0 to 255, truncated. Source: Wan2.2 wan/utils/utils.py, save_video."""
    return (frames.clip(0, 1) * np.float32(255)).astype(np.uint8)


def _metadata(recipe: Recipe, keep: bool, prompt: bool) -> str | None:
    """Return what a file says of its recipe."""
    if not keep:
        return None
    return (recipe if prompt else recipe.without_prompts()).to_json()


def _counted(video: np.ndarray, bar: Any) -> Iterator[np.ndarray]:
    for frame in video:
        yield frame
        bar.update()
