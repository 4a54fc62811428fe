"""The files of a data set, each with its caption: in a folder with text files, or named by a list."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import as_path, cut, listed
from .config import DataConfig

VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".wmv", ".flv", ".mpg", ".mpeg", ".ts"}
    | {".m2ts", ".mts", ".ogv", ".3gp"}
)
IMAGES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2"}
)
LISTS = (".jsonl", ".csv")
# What a list calls a file, and its caption: musubi's, DiffSynth's and Hugging Face's names.
FILE_KEYS = ("video", "image", "video_path", "image_path", "file_name", "path")
CAPTION_KEYS = ("caption", "text", "prompt")
_METADATA = ("metadata.jsonl", "metadata.csv")
_LONGEST = 2**20  # characters of a caption


@dataclass(frozen=True)
class Captioned:
    """One file of a data set; `caption` is None where there is none, `problem` says what is wrong with it."""

    path: Path
    is_video: bool
    caption: str | None
    problem: str | None = None


def files_of(config: DataConfig) -> list[Captioned]:
    """Return the files of a data set in the order of their names, or of their list.

    Raises:
        FileNotFoundError: there is no such folder or list.
        ValueError: the list cannot be read, or there are no files.
    """
    source = as_path(config.source)
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or file {cut(source)}")
    if source.is_dir():
        found = _in_folder(source, config)
    elif source.suffix.lower() in LISTS:
        found = list(_in_list(source, config))
    elif kind_of(source) is not None:
        found = [_with_caption_beside(source, config)]
    else:
        raise ValueError(f"{cut(source)} is no data set: a folder, a .jsonl, a .csv or a .toml file is one")
    if not found:
        raise ValueError(_nothing_in(source, config))
    return found


def kind_of(path: Path) -> bool | None:
    """Return whether a file is a video, by its ending; None for what is neither video nor image."""
    ending = path.suffix.lower()
    return True if ending in VIDEOS else False if ending in IMAGES else None


def _wanted(path: Path, config: DataConfig) -> bool:
    kind = kind_of(path)
    return kind is not None and config.only in (None, "videos" if kind else "images")


# ---- folders ----


def _in_folder(folder: Path, config: DataConfig) -> list[Captioned]:
    for name in _METADATA:
        if (folder / name).is_file():
            return [file for file in _in_list(folder / name, config) if _wanted(file.path, config)]
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    return [_with_caption_beside(path, config) for path in paths if _wanted(path, config)]


def _with_caption_beside(path: Path, config: DataConfig) -> Captioned:
    """Return a file with the caption in the text file beside it."""
    beside = path.with_suffix("." + config.caption_extension.lstrip("."))
    try:
        caption = beside.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return _captioned(path, None, config, f"there is no caption {beside.name}")
    except (OSError, UnicodeDecodeError) as error:
        return Captioned(path, bool(kind_of(path)), None, f"{beside.name} cannot be read: {cut(error)}")
    return _captioned(path, caption or None, config, f"{beside.name} is empty")


def _captioned(path: Path, caption: str | None, config: DataConfig, otherwise: str) -> Captioned:
    caption = config.default_caption if caption is None else caption
    problem = f"{otherwise}; default_caption serves files without" if caption is None else None
    if caption is not None and len(caption) > _LONGEST:
        problem = f"its caption has {len(caption)} characters, at most {_LONGEST}"
    return Captioned(path, bool(kind_of(path)), caption, problem)


def _nothing_in(source: Path, config: DataConfig) -> str:
    what = config.only or "videos or images"
    message = f"{cut(source)} holds no {what}"
    if source.is_dir():
        if any(source.glob("*.parquet")) or any(source.glob("*/*.parquet")):
            return f"{message}, but .parquet: write its files into a folder with metadata.jsonl beside them"
        folders = [path.name for path in source.iterdir() if path.is_dir()]
        others = {path.suffix for path in source.iterdir() if path.is_file()} - {config.caption_extension, ""}
        if folders:
            message += f"; its folders ({listed(folders)}) are data sets of their own"
        if others:
            message += f"; it has {listed(others)}, and {', '.join(sorted(VIDEOS)[:3])}, … are read"
    return message


# ---- lists ----


def _in_list(path: Path, config: DataConfig) -> Iterator[Captioned]:
    """Yield the files that a list names: as they are, or relative to the list's folder."""
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    for number, row in rows:
        where = f"{cut(path)}, line {number}"
        place = _entry(row, FILE_KEYS, where, "a file")
        if place is None:
            raise ValueError(f"{where} names no file: one of {', '.join(FILE_KEYS)} does")
        file = as_path(place)
        if not file.is_absolute() and ((path.parent / file).exists() or not file.exists()):
            file = path.parent / file
        if kind_of(file) is None:
            raise ValueError(f"{where}: {cut(place)} is no video or image by its ending")
        caption = _entry(row, CAPTION_KEYS, where, "a caption")
        if caption is None:
            beside = _with_caption_beside(file, config)
            missing = _captioned(file, None, config, f"{where} has no caption")
            yield missing if beside.caption is None else beside
        else:
            yield _captioned(file, caption.strip() or None, config, f"{where} has an empty caption")


def _entry(row: Mapping[str, Any], names: tuple[str, ...], where: str, what: str) -> str | None:
    """Return the entry of a row that has one of the names; None without."""
    given = [name for name in names if row.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{where} has {' and '.join(given)}, each of which would be {what}; keep one")
    if given and not isinstance(row[given[0]], str):
        raise ValueError(f"{where}: {given[0]} must be a text")
    return row[given[0]] if given else None


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{cut(path)}, line {number} is not JSON: {cut(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{cut(path)}, line {number} must be {{"video": …, "caption": …}}')
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(_text_of(path).splitlines(keepends=True))
    try:
        for row in reader:
            # A short row has None where entries are missing.
            yield reader.line_num, {name: value for name, value in row.items() if isinstance(value, str)}
    except csv.Error as error:
        raise ValueError(f"{cut(path)} is not CSV: {cut(error)}") from error


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{cut(path)} is not a text in UTF-8: {cut(error)}") from error
