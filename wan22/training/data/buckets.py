"""Sizes and lengths of clips: what a checkpoint allows, and what a file of some size and length gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checks import check_num_frames, check_size
from ...pipelines.call.images import Size, closest_size, floor_size
from .config import DataConfig

# Clips that go on from a first frame need one after it.
_CONTINUED = ("i2v", "flf2v")
_PATCH = (1, 2, 2)  # of every released transformer


@dataclass(frozen=True)
class Rules:
    """What a checkpoint's clips are like.

    Args:
        kind: "t2v", "i2v", "flf2v" or "ti2v".
        cell: width and height in pixels that sides are multiples of.
        stride: frames per latent frame.
        fps: frames per second.
        frames: frames of a clip, by default at most.
        resolution: width and height in pixels, by default.
    """

    kind: str
    cell: Size
    stride: int
    fps: int
    frames: int
    resolution: Size

    @classmethod
    def of(cls, pipe: Any) -> "Rules":
        """Return the rules of a pipeline's checkpoint, whose weights need not be loaded."""
        models, preset, scale = pipe.transformers, pipe.preset, pipe.vae_scale_factor_spatial
        _, rows, columns = models[0].config.patch_size if models else _PATCH
        return cls(
            kind=kind_of(pipe),
            cell=(columns * scale, rows * scale),
            stride=pipe.vae_scale_factor_temporal,
            fps=preset.fps,
            frames=preset.num_frames,
            resolution=(preset.width, preset.height),
        )

    @property
    def least_frames(self) -> int:
        """Frames of the shortest clip."""
        return 1 + self.stride if self.kind in _CONTINUED else 1


def kind_of(pipe: Any) -> str:
    """Return what a pipeline's checkpoint is for: "t2v", "i2v", "flf2v" or "ti2v"."""
    if pipe.config.expand_timesteps:
        return "ti2v"
    if not pipe.transformers:
        return "i2v" if hasattr(pipe, "image_encoder") else "t2v"
    config = pipe.any_transformer.config
    if config.in_channels == config.out_channels:
        return "t2v"
    return "i2v" if config.pos_embed_seq_len is None else "flf2v"


def check_rules(config: DataConfig, rules: Rules) -> None:
    """Refuse lengths and sizes that a checkpoint has not; a ValueError names the nearest."""
    for length in config.frames:
        try:
            check_num_frames(length, rules.stride)
        except ValueError as error:
            raise ValueError(str(error).replace("num_frames=", "frames=")) from error
    if config.resolution is not None and not config.buckets:
        for name, side, multiple in zip(("width", "height"), config.resolution, rules.cell, strict=True):
            check_size(name, side, multiple)
    if config.extraction != "full" and config.frames and config.frames[-1] < rules.least_frames:
        raise ValueError(
            f"frames={config.frames} has no length for {rules.kind}, whose clips go on from their first "
            f"frame: {rules.least_frames} frames or more"
        )


def bucket_size(size: Size, config: DataConfig, rules: Rules) -> Size:
    """Return the width and height of the clips of a file of a size; a ValueError says that there is none."""
    resolution = config.resolution or rules.resolution
    area = resolution[0] * resolution[1]
    if not config.buckets:
        found = resolution
        if not config.upscale and (size[0] < found[0] or size[1] < found[1]):
            raise ValueError(f"it has {size[0]}x{size[1]} pixels, less than {found[0]}x{found[1]}")
        return found
    if config.upscale:
        found = closest_size(size, area, rules.cell)
    else:  # each side at most the file's
        found = floor_size(size, min(area, size[0] * size[1]), rules.cell)
    if 0 in found:
        rule = f"with that aspect, {area} pixels have no sides of whole {rules.cell[0]}x{rules.cell[1]} cells"
        raise ValueError(f"it has {size[0]}x{size[1]} pixels; {rule}")
    return found


def windows(count: int, config: DataConfig, rules: Rules) -> list[tuple[int, int]]:
    """Return first frame and length of each clip of a video of `count` frames; none if it is too short.

    Source: musubi-tuner src/musubi_tuner/dataset/image_video_dataset.py, for each `extraction`.
    """
    found = [
        (start, length)
        for length in _lengths(count, config, rules)
        for start in _starts(count, length, config)
    ]
    return sorted(set(found))


def shortest(config: DataConfig, rules: Rules) -> int:
    """Return the frames of the shortest clip that a data set has."""
    lengths = () if config.extraction == "full" else config.frames
    return min((n for n in lengths if n >= rules.least_frames), default=rules.least_frames)


def _lengths(count: int, config: DataConfig, rules: Rules) -> Sequence[int]:
    """Return the lengths of a video's clips."""
    if config.extraction == "full" or not config.frames:
        most = config.max_frames if config.extraction == "full" else rules.frames
        longest = (min(count, most) - 1) // rules.stride * rules.stride + 1
        return [longest] if longest >= rules.least_frames else []
    fitting = [n for n in config.frames if rules.least_frames <= n <= count]
    return fitting if config.every_length else fitting[-1:]


def _starts(count: int, length: int, config: DataConfig) -> Sequence[int]:
    """Return the first frames of the clips of a length."""
    last = count - length
    if config.extraction == "chunk":
        return range(0, last + 1, length)
    if config.extraction == "slide":
        return range(0, last + 1, config.stride)
    if config.extraction == "uniform":
        return [int(start) for start in np.linspace(0, last, config.samples, dtype=int)]
    return [0]
