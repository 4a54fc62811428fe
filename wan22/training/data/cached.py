"""Clips that are encoded: one safetensors file each in a folder, and an index that lists them.

Shapes: c latent channels, t h w latent frames, rows, columns, l image tokens, s text tokens, d their width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.files.safetensors import STORED_DTYPES, read_header, read_safetensors
from ...checks import as_path, cut, shown
from ...whole_files import whole_file

FORMAT = "wan22.clip.1"  # in a file's metadata, and in the index
INDEX = "clips.json"
EMPTY = "no-caption.safetensors"
CONDITIONED = ("i2v", "flf2v")  # kinds of checkpoints that take a condition in channels
_UNFINISHED = "run `wan22 cache` again, it goes on"


@dataclass(frozen=True, eq=False)
class Sample:
    """One encoded clip.

    Args:
        latents: normalised latents, the posterior's mean, "c t h w" float32.
        condition: for I2V checkpoints, a mask of 4 channels and the latents of the clip of the first frame
            (FLF: and the last) and zeros, "4+c t h w" float32; None for others.
        image_embeds: for Wan 2.1 I2V, tokens of the first frame, "l d" (FLF: then of the last, "2l d"), in
            the image encoder's dtype; None for others.
        text: the caption's tokens without padding, "s d" with s up to 512, in the text encoder's dtype.
    """

    latents: torch.Tensor
    condition: torch.Tensor | None
    image_embeds: torch.Tensor | None
    text: torch.Tensor


@dataclass(frozen=True)
class CachedItem:
    """What is known of an encoded clip without reading its tensors.

    Args:
        file: its file.
        shape: of its latents, "c t h w".
        repeats: how often an epoch has it.
        caption: what it shows.
        name: of the file that it was made of, with its frames.
    """

    file: Path
    shape: tuple[int, int, int, int]
    repeats: int
    caption: str
    name: str


@dataclass(frozen=True, eq=False)
class CachedClips:
    """The encoded clips of a folder.

    Args:
        folder: the folder.
        checkpoint: what they are encoded for: "kind" ("t2v", "i2v", "flf2v" or "ti2v"), "name", marks of
            "vae" and "text_encoder", "fps", and versions.
        items: the clips, in the order of the data sets.
        empty_text: the tokens of an empty caption, "s d", for caption dropout.
    """

    folder: Path
    checkpoint: Mapping[str, Any]
    items: Sequence[CachedItem]
    empty_text: torch.Tensor

    @classmethod
    def open(cls, folder: str | Path) -> "CachedClips":
        """Open a folder that `wan22 cache` has finished; every file's header is checked.

        Raises:
            FileNotFoundError: the folder is not there or not finished, or a file is missing.
            ValueError: the index or a file is damaged, or belongs to another checkpoint.
        """
        folder = as_path(folder)
        if not (folder / INDEX).is_file():
            state = f"has no {INDEX}; {_UNFINISHED}" if folder.is_dir() else "is not there"
            raise FileNotFoundError(f"the folder of encoded clips {cut(folder)} {state}")
        checkpoint, entries = _read_index(folder / INDEX)
        items = [_item(folder / name, repeats, checkpoint) for name, repeats in entries]
        empty = Header.read(folder / EMPTY)
        _check_mark(empty, "text_encoder", checkpoint)
        return cls(folder, checkpoint, items, _tensors(empty.path)["text"].clone())

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Sample:
        """Return a clip; a ValueError names a file that is damaged or not finite."""
        path = self.items[index].file
        tensors = _tensors(path)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{cut(path)}: {name} is not finite; remove the file, and {_UNFINISHED}")
        condition, embeds = tensors.get("condition"), tensors.get("image_embeds")
        return Sample(
            latents=tensors["latents"].float().clone(),
            condition=None if condition is None else condition.float().clone(),
            image_embeds=None if embeds is None else embeds.clone(),
            text=tensors["text"].clone(),
        )


def write_index(folder: Path, checkpoint: Mapping[str, Any], entries: Sequence[tuple[str, int]]) -> None:
    """Write the index of a folder: what the clips are encoded for, and names and repeats of their files."""
    clips = [{"file": name, "repeats": repeats} for name, repeats in entries]
    text = json.dumps({"format": FORMAT, "checkpoint": dict(checkpoint), "clips": clips}, indent=1)
    with whole_file(folder / INDEX) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read_index(path: Path) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Return the checkpoint, and name and repeats of each clip; a ValueError refuses anything else."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {shown(index['format'])}, not {FORMAT}")
        checkpoint, clips = index["checkpoint"], index["clips"]
        marks = [checkpoint[name] for name in ("kind", "name", "vae", "text_encoder")]
        if not clips or not all(isinstance(mark, str) for mark in marks):
            raise ValueError("it lists no clips")
        entries = [(clip["file"], clip["repeats"]) for clip in clips]
        for name, repeats in entries:
            if Path(name).name != name or type(repeats) is not int or repeats < 1:
                raise ValueError(f"an entry is {shown((name, repeats))}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{cut(path)} is damaged: {cut(error)}; {_UNFINISHED}") from error
    return checkpoint, entries


def _item(path: Path, repeats: int, checkpoint: Mapping[str, Any]) -> CachedItem:
    """Return a clip; its file must be whole, and belong to the checkpoint."""
    header = Header.read(path)
    for name in ("vae", "text_encoder", "kind"):
        _check_mark(header, name, checkpoint)
    shape = header.shapes.get("latents", ())
    if len(shape) != 4 or len(header.shapes.get("text", ())) != 2:
        raise ValueError(f"{cut(path)} has no latents or no text yet; {_UNFINISHED}")
    condition = header.shapes.get("condition")
    if (condition is not None) != (checkpoint["kind"] in CONDITIONED):
        raise ValueError(f"{cut(path)} is not a clip for {checkpoint['kind']}; {_UNFINISHED}")
    if condition is not None and (len(condition) != 4 or condition[1:] != shape[1:]):
        raise ValueError(f"{cut(path)}: condition and latents have shapes {condition} and {shape}")
    c, t, h, w = shape
    caption, name = (header.metadata.get(key, "") for key in ("caption", "name"))
    return CachedItem(path, (c, t, h, w), repeats, caption, name)


def _check_mark(header: "Header", name: str, checkpoint: Mapping[str, Any]) -> None:
    if header.metadata.get(name) != checkpoint[name]:
        raise ValueError(
            f"{cut(header.path)} belongs to another checkpoint: its {name} is not that of {INDEX}; "
            f"{_UNFINISHED}"
        )


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return a clip's tensors, mapped from its file."""
    return read_safetensors(path)[0]


@dataclass(frozen=True)
class Header:
    """What a whole file of ours says of itself: shapes of its tensors, and its metadata."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Read a file's header.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no file of ours, is cut off, or its shapes are of no use.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {cut(path)}; {_UNFINISHED}")
        entries, metadata = read_header(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{cut(path)} is no encoded clip")
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if path.stat().st_size != end:
            raise ValueError(f"{cut(path)} has {path.stat().st_size} bytes, and must have {end}")
        for name, entry in entries.items():
            if entry["dtype"] not in STORED_DTYPES or not all(
                type(size) is int and size > 0 for size in entry["shape"]
            ):
                raise ValueError(f"{cut(path)}: {cut(name)} is {entry['dtype']} {shown(entry['shape'])}")
        return cls(path, {name: tuple(entry["shape"]) for name, entry in entries.items()}, metadata)
