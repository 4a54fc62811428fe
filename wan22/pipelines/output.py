"""What a pipeline call returns: the frames, their rate, and the recipe that made them.

Shapes: b videos, t frames, h rows, w columns, c colours.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

OUTPUT_TYPES = ("np", "pil", "pt", "latent")


@dataclass(frozen=True)
class Recipe:
    """Every setting of one call.

    Args:
        checkpoint: the preset's name, or where the weights came from.
        prompts: one per video.
        negative_prompts: one per video; None where embeddings were given or guidance was off.
        seeds: one per video; None where the caller gave latents.
        height: pixels.
        width: pixels.
        num_frames: frames.
        fps: frames per second.
        scheduler: class name.
        num_inference_steps: denoising steps.
        flow_shift: of the noise schedule; None where timesteps or sigmas were given.
        guidance_scale: of the high-noise expert, or the only transformer.
        guidance_scale_2: of the low-noise expert.
        boundary_ratio: where the experts switch; None for one transformer.
        images: first frames, one or one per prompt, by path or URL; None for one that was in memory.
        last_images: last frames, likewise.
        fit: how the images were brought to the size; None: the official way.
    """

    checkpoint: str
    prompts: tuple[str | None, ...]
    negative_prompts: tuple[str | None, ...]
    seeds: tuple[int | None, ...]
    height: int
    width: int
    num_frames: int
    fps: int
    scheduler: str
    num_inference_steps: int
    flow_shift: float | None
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    images: tuple[str | None, ...] = ()
    last_images: tuple[str | None, ...] = ()
    fit: str | None = None

    def __str__(self) -> str:
        scales = f"{self.guidance_scale:g}"
        if self.guidance_scale_2 is not None:
            scales += f"/{self.guidance_scale_2:g} (high/low noise, boundary {self.boundary_ratio:g})"
        shift = "custom schedule" if self.flow_shift is None else f"shift {self.flow_shift:g}"
        size = f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps"
        return (
            f"{self.checkpoint}: {len(self.prompts)} x {size}, {self.num_inference_steps} steps of "
            f"{self.scheduler}, {shift}, guidance {scales}, seeds {', '.join(map(str, self.seeds))}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)


@dataclass
class WanVideo(BaseOutput):
    """Generated videos.

    Args:
        frames: "np": float32 array "b t h w c" in [0, 1]; "pt": the same as a tensor "b t c h w"; "pil": a
            list of frames per video; "latent": normalised latents, a tensor "b c t h w".
        fps: frames per second of the checkpoint.
        recipe: every setting of the call.
    """

    frames: Any
    fps: int
    recipe: Recipe

    def save(self, path: str | Path, overwrite: bool = False) -> list[Path]:
        """Write each video as an H.264 MP4 that plays in browsers.

        Args:
            path: file name ending in .mp4; with several videos a number is put before the ending.
            overwrite: whether existing files are replaced.

        Returns: the files.

        Raises:
            ValueError: another ending, or frames that are latents.
            FileExistsError: a file exists.
            OSError: a file could not be written; the frames are still here to be saved elsewhere.
        """
        videos = self.as_uint8()
        paths = _numbered(Path(path), len(videos), ".mp4", overwrite)
        for video, target in zip(videos, paths, strict=True):
            write_mp4(video, target, self.fps)
        return paths

    def contact_sheet(self, columns: int = 8, cell_width: int = 192) -> Image.Image:
        """Draw one row per video: `columns` of its frames, first to last, each `cell_width` pixels wide."""
        rows = []
        for video in self.as_uint8():
            _, h, w, _ = video.shape
            size = cell_width, max(1, round(h * cell_width / w))
            # Whole multiples keep the pixels of miniature videos crisp.
            resample = Image.Resampling.NEAREST if cell_width % w == 0 else Image.Resampling.LANCZOS
            picks = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
            cells = [np.asarray(Image.fromarray(video[i]).resize(size, resample)) for i in picks]
            rows.append(np.concatenate([np.pad(cell, ((2, 2), (2, 2), (0, 0))) for cell in cells], axis=1))
        return Image.fromarray(np.concatenate(rows))

    def as_uint8(self) -> list[np.ndarray]:
        """Return each video as "t h w c" in 0 to 255, truncated as in the official code.

        Raises:
            ValueError: the frames are latents.
        """
        if isinstance(self.frames, list):
            return [np.stack([np.asarray(frame) for frame in video]) for video in self.frames]
        if isinstance(self.frames, torch.Tensor):
            if self.frames.shape[1:3] != (self.recipe.num_frames, 3):
                raise ValueError(
                    "the frames are latents (output_type='latent'); decode them with pipe.decode first"
                )
            return list(to_uint8(self.frames.permute(0, 1, 3, 4, 2).float().cpu().numpy()))
        return list(to_uint8(self.frames))


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Turn [0, 1] into 0 to 255, truncated. Source: Wan2.2 wan/utils/utils.py, save_video."""
    return (frames.clip(0, 1) * np.float32(255)).astype(np.uint8)


def write_mp4(video: np.ndarray, path: Path, fps: int) -> None:
    """Write one video as H.264, yuv420p, with the index in front so that it plays while it loads.

    Args:
        video: uint8 "t h w 3", h and w even.
        path: replaced if it exists; appears only once it is whole.
        fps: frames per second.

    Raises:
        ValueError: h or w is odd.
        OSError: the file could not be written.
    """
    import imageio_ffmpeg

    _, h, w, _ = video.shape
    if h % 2 or w % 2:
        raise ValueError(f"frames of {w}x{h} pixels cannot be written as yuv420p; the sizes must be even")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    # The tags say what the conversion from RGB did; players guess by size otherwise.
    convert = "scale=out_color_matrix=bt709:out_range=tv"
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    writer = imageio_ffmpeg.write_frames(
        str(partial),
        (w, h),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        quality=None,
        macro_block_size=1,
        output_params=["-crf", "16", "-vf", f"{convert},{tags}", "-movflags", "+faststart"],
    )
    try:
        writer.send(None)
        for frame in video:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        # imageio does not tell whether ffmpeg could write to the end.
        with suppress(RuntimeError):
            if partial.exists() and imageio_ffmpeg.count_frames_and_secs(str(partial))[0] == len(video):
                partial.replace(path)
                return
        raise OSError(f"{path} could not be written whole; is the disk full?")
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _numbered(path: Path, count: int, suffix: str, overwrite: bool) -> list[Path]:
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}: {path.with_suffix(suffix)}")
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    taken = [str(p) for p in paths if p.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists; overwrite=True replaces it")
    return paths
