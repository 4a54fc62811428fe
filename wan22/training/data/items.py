"""The clips of data sets: every file is looked at, and what is wrong with any is said before work begins."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checks import as_path, cut, listed, refuse_unknown
from ...pipelines.call.images import load_picture
from ...progress import progress_bar
from ...video.reading import VideoFile
from .buckets import Rules, bucket_size, check_rules, shortest, windows
from .config import DataConfig
from .dialect import read_toml
from .scans import Scans
from .sources import Captioned, files_of

__all__ = ["DataConfig", "Item", "Rules", "find_items", "read_configs"]

logger = logging.getLogger(__name__)

Data = str | Path | DataConfig | Sequence[DataConfig]


@dataclass(frozen=True)
class Item:
    """One training clip.

    Args:
        file: the video or picture.
        start: its first frame, counted at the clips' rate.
        frames: number of frames.
        bucket: frames, height and width in pixels.
        caption: what it shows.
        repeats: how often an epoch has it.
        numbers: the frames of the file that it shows, in order.
        video: the file, if it is a video.
    """

    file: Path
    start: int
    frames: int
    bucket: tuple[int, int, int]
    caption: str
    repeats: int
    numbers: tuple[int, ...] = field(repr=False)
    video: VideoFile | None = field(default=None, repr=False)


def read_configs(data: Data, **defaults: Any) -> list[DataConfig]:
    """Return data sets: those of a TOML file, that of a folder or a list of files, or those that are given.

    `defaults` are fields of `DataConfig` for a folder or a list.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a setting breaks its rule.
        TypeError: there is no such setting.
    """
    if isinstance(data, DataConfig) or not isinstance(data, str | Path):
        configs = [data] if isinstance(data, DataConfig) else list(data)
        if defaults or not all(isinstance(config, DataConfig) for config in configs):
            raise ValueError("data must be a path with settings, or DataConfig that have theirs")
        return configs
    refuse_unknown("a data set", defaults, DataConfig.__dataclass_fields__)
    path = as_path(data)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or file {cut(path)}")
    if path.suffix.lower() != ".toml":
        return [DataConfig(str(path), **defaults)]
    if defaults:
        raise ValueError(f"{cut(path)} has its own settings; write {', '.join(sorted(defaults))} there")
    return read_toml(path)[0]


def find_items(
    configs: DataConfig | Sequence[DataConfig],
    rules: Rules,
    skip: bool = False,
    progress: bool = False,
    scans: Scans | None = None,
) -> list[Item]:
    """Return the clips of data sets. Videos are decoded once, so that damage is found.

    Args:
        configs: the data sets.
        rules: what the checkpoint's clips are like.
        skip: whether files that cannot be used are left out, with a warning, in place of refused.
        progress: whether a bar shows how many files are looked at.
        scans: what earlier runs found out.

    Raises:
        FileNotFoundError: there is no such folder or list.
        ValueError: a setting does not go with the checkpoint, files cannot be used (all of them are counted,
            and the first ones named), or there is nothing to train on.
    """
    configs = [configs] if isinstance(configs, DataConfig) else list(configs)
    for config in configs:
        check_rules(config, rules)
    listed_files = [(config, file) for config in configs for file in files_of(config)]
    scans = scans or Scans()
    items: list[Item] = []
    problems: list[str] = []
    hidden = {} if progress else {"disable": True}
    for config, file in progress_bar(listed_files, desc="looking at files", unit="file", **hidden):
        try:
            items += _clips_of(file, config, rules, scans)
        except (OSError, ValueError) as error:
            problems.append(_about(file.path, error))
    for problem in problems if skip else ():
        logger.warning("left out: %s", problem)
    if problems and not skip:
        few = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"{len(problems)} of {len(listed_files)} files cannot be used: {few}")
    if not items:
        raise ValueError(f"there is nothing to train on in {listed(config.source for config in configs)}")
    return items


def _about(path: Path, error: Exception) -> str:
    """Return an error's text, which names the file in any case."""
    text = cut(error)
    return text if path.name in text else f"{cut(path)}: {text}"


def _clips_of(file: Captioned, config: DataConfig, rules: Rules, scans: Scans) -> Iterator[Item]:
    """Yield the clips of a file; an OSError or a ValueError says why it cannot be used."""
    if file.problem is not None or file.caption is None:
        raise ValueError(file.problem or "it has no caption")
    video = None
    if file.is_video:
        video = scans.video(file.path)
        size = video.width, video.height
        numbers = video.resampled(None if config.keep_fps else rules.fps, config.source_fps)
        found = windows(len(numbers), config, rules)
        if not found:
            rate = "" if config.keep_fps else f" at {rules.fps} fps"
            least = shortest(config, rules)
            raise ValueError(f"it has {len(numbers)} frames{rate}; the shortest clip has {least}")
    else:
        if rules.least_frames > 1:
            raise ValueError(f"it is a picture; a clip for {rules.kind} goes on from its first frame")
        size, numbers, found = load_picture("image", file.path).size, [0], [(0, 1)]
    width, height = bucket_size(size, config, rules)
    for start, length in found:
        shown = tuple(numbers[start : start + length])
        bucket = length, height, width
        yield Item(file.path, start, length, bucket, file.caption, config.repeats, shown, video)
