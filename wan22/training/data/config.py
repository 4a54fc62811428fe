"""What a data set is: where its files are, and how clips are made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...checks import check_choice, check_positive_int, check_real, shown

Extraction = Literal["head", "chunk", "slide", "uniform", "full"]
EXTRACTIONS = get_args(Extraction)
Kind = Literal["videos", "images"]


@dataclass(frozen=True)
class DataConfig:
    """One data set. What is wrong with a value is a ValueError here; what is wrong with a file, later.

    Args:
        source: a folder of videos and pictures with a text file of the same name beside each, or with
            metadata.jsonl or metadata.csv in it; or a .jsonl or .csv file that lists them.
        resolution: width and height in pixels, whose product is the area that clips have; None: the
            checkpoint's.
        frames: lengths of clips, each 1 + a multiple of 4; a video gives the longest that it has frames for.
            Empty: any length up to the checkpoint's.
        extraction: "head": the first frames; "chunk": one clip after the other; "slide": one every `stride`
            frames; "uniform": `samples` clips evenly over the video; "full": one clip of all frames, at
            most `max_frames`.
        every_length: whether a video gives clips of each length of `frames` that it has frames for.
        stride: frames from one clip to the next with "slide".
        samples: clips of a video with "uniform".
        max_frames: frames of the longest clip with "full".
        keep_fps: whether every frame of a file is one of a clip, whatever the file's rate; otherwise videos
            are resampled to the checkpoint's frames per second.
        source_fps: the files' frames per second, in place of what they say themselves.
        buckets: whether clips keep their aspect; otherwise all are cropped to `resolution`.
        upscale: whether files smaller than the area are enlarged to it.
        repeats: how often an epoch has each clip.
        caption_extension: ending of the text files.
        default_caption: caption of files that have none; None: these are refused.
        only: "videos" or "images": a folder's other files are left out; None: both are used.
    """

    source: str
    resolution: tuple[int, int] | None = None
    frames: tuple[int, ...] = ()
    extraction: Extraction = "head"
    every_length: bool = False
    stride: int = 1
    samples: int = 1
    max_frames: int = 129
    keep_fps: bool = False
    source_fps: float | None = None
    buckets: bool = True
    upscale: bool = True
    repeats: int = 1
    caption_extension: str = ".txt"
    default_caption: str | None = None
    only: Kind | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None:
            object.__setattr__(self, "resolution", _pair("resolution", self.resolution))
        object.__setattr__(self, "frames", _lengths(self.frames))
        check_choice("extraction", self.extraction, EXTRACTIONS)
        for name in ("stride", "samples", "max_frames", "repeats"):
            check_positive_int(name, getattr(self, name))
        for name in ("every_length", "keep_fps", "buckets", "upscale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False")
        if self.source_fps is not None:
            check_real("source_fps", self.source_fps, 0, above=True)
        if self.keep_fps and self.source_fps is not None:
            raise ValueError("keep_fps and source_fps are given; give one or the other")
        if not isinstance(self.caption_extension, str) or not self.caption_extension.strip("."):
            raise ValueError(
                f"caption_extension={shown(self.caption_extension)} must be an ending such as '.txt'"
            )
        if not isinstance(self.default_caption, str | None):
            raise ValueError(f"default_caption={shown(self.default_caption)} must be a text")
        if self.only is not None:
            check_choice("only", self.only, get_args(Kind))


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Return a width and a height; one number is both."""
    value = (value, value) if isinstance(value, int) else value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name}={shown(value)} must be a width and a height in pixels, such as (832, 480)")
    width, height = (check_positive_int(name, side) for side in value)
    return width, height


def _lengths(value: Any) -> tuple[int, ...]:
    """Return numbers of frames, in order; one number is the only one."""
    value = (value,) if isinstance(value, int) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"frames={shown(value)} must be numbers of frames, such as (17, 33, 81)")
    return tuple(sorted({check_positive_int("frames", length) for length in value}))
