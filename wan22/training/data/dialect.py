"""Data sets as musubi-tuner writes them: a TOML file with [general] and [[datasets]].

Source: musubi-tuner src/musubi_tuner/dataset/config_utils.py and docs/dataset_config.md.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checks import as_path, cut, shown
from ..toml import parse_toml
from .config import DataConfig, Kind

logger = logging.getLogger(__name__)

# Keys, and the fields of DataConfig that they are.
KEYS = {
    "resolution": "resolution",
    "caption_extension": "caption_extension",
    "num_repeats": "repeats",
    "enable_bucket": "buckets",
    "target_frames": "frames",
    "frame_extraction": "extraction",
    "frame_stride": "stride",
    "frame_sample": "samples",
    "max_frames": "max_frames",
    "source_fps": "source_fps",
    # Beside those of that program:
    "keep_fps": "keep_fps",
    "default_caption": "default_caption",
}
SOURCES: dict[str, Kind] = {
    "video_directory": "videos",
    "video_jsonl_file": "videos",
    "image_directory": "images",
    "image_jsonl_file": "images",
}
NO_UPSCALE, CACHE = "bucket_no_upscale", "cache_directory"
# Keys that say nothing about clips, and who does.
LEFT_OUT = {
    "batch_size": "the training has a batch size of its own",
    "skip_corrupted_cache": "what is damaged is encoded again",
}


def read_toml(path: Path) -> tuple[list[DataConfig], str | None]:
    """Return the data sets of a file, and the folder for what is encoded, if it names exactly one.

    A data set's own entries come before those of [general]. As in that program, clips keep their aspect only
    with enable_bucket, and a video gives clips of each length of target_frames; otherwise than there, videos
    are resampled to the checkpoint's rate unless keep_fps is true.

    Raises: ValueError: it is no TOML, has an unknown key, or a value that breaks its rule.
    """
    tables = parse_toml(path)
    for name in tables.keys() - {"general", "datasets"}:
        raise ValueError(f"{cut(path)}: {_unknown(name, ('general', 'datasets'))}")
    general, sets = tables.get("general", {}), tables.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(sets, list) or not all(map(_is_table, sets)):
        raise ValueError(f"{cut(path)} must have a table [general] and tables [[datasets]]")
    if not sets:
        raise ValueError(f"{cut(path)} has no [[datasets]]")
    _check_keys(f"{cut(path)}, [general]", general, sources=False)
    configs, folders = [], set()
    for i, table in enumerate(sets):
        where = f"{cut(path)}, [[datasets]] number {i + 1}"
        _check_keys(where, table, sources=True)
        entries = {**general, **table}
        for name in LEFT_OUT.keys() & entries.keys():
            logger.warning("%s: %s is left out: %s", where, name, LEFT_OUT[name])
        folders.add(str(entries[CACHE]) if CACHE in entries else None)
        try:
            configs.append(_config(entries, path.parent))
        except ValueError as error:
            raise ValueError(f"{where}: {_in_keys(str(error))}") from error
    named = folders - {None}
    if len(named) != 1:  # all share one folder here, where each has its own in that program
        return configs, None
    return configs, str(_beside(path.parent, named.pop(), CACHE))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _check_keys(where: str, table: Mapping[str, Any], sources: bool) -> None:
    """Refuse a key that is not known, and one of [[datasets]] in [general]."""
    known = [*KEYS, NO_UPSCALE, CACHE, *LEFT_OUT, *SOURCES]
    for name in table:
        if name not in known:
            raise ValueError(f"{where}: {_unknown(name, known)}")
        if name in SOURCES and not sources:
            raise ValueError(f"{where}: {name} belongs to [[datasets]]")


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(cut(name), known, 1, 0.5)
    hint = f"the nearest is {near[0]}" if near else f"known: {', '.join(known)}"
    return f"{cut(name)} is not known; {hint}"


def _config(entries: Mapping[str, Any], folder: Path) -> DataConfig:
    """Return a data set; a ValueError names the field that is wrong."""
    given = [name for name in SOURCES if name in entries]
    if len(given) != 1:
        raise ValueError(f"it must have one of {', '.join(SOURCES)}, and has {', '.join(given) or 'none'}")
    (name,) = given
    fields = {KEYS[key]: value for key, value in entries.items() if key in KEYS}
    fields = {"buckets": False, **fields}
    if NO_UPSCALE in entries:
        if not isinstance(entries[NO_UPSCALE], bool):
            raise ValueError(f"{NO_UPSCALE}={shown(entries[NO_UPSCALE])} must be true or false")
        fields["upscale"] = not entries[NO_UPSCALE]
    place = str(_beside(folder, entries[name], name))
    return DataConfig(place, only=SOURCES[name], every_length=True, **fields)


def _beside(folder: Path, place: Any, name: str) -> Path:
    """Return a path that a file names: as it is, or, if it is not there, beside that file."""
    if not isinstance(place, str):
        raise ValueError(f"{name}={shown(place)} must be a path")
    path = as_path(place)
    return path if path.is_absolute() or path.exists() else folder / path


def _in_keys(message: str) -> str:
    """Return a message about a field in the words of the file."""
    for key, field in KEYS.items():
        message = message.replace(f"{field}=", f"{key}=")
    return message
