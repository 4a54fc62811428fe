"""Encode data sets into a folder: first all clips, then all captions, each once.

What is there already and fits is kept: an interrupted run goes on, a changed caption encodes the text alone,
and changed files, sizes or models encode what they change.
"""

import hashlib
import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ... import __version__
from ...checkpoints.converting.writing import check_room
from ...checkpoints.files.safetensors import read_safetensors
from ...checks import as_path, check_choice, cut
from ...presets import MAX_TEXT_TOKENS
from ...progress import progress_bar
from ...whole_files import is_temporary, whole_file
from .buckets import Rules
from .cached import EMPTY, FORMAT, CachedClips, Header, write_index
from .encoding import Encoders, clips_of_file, encode_caption, encode_clip, mark_of
from .items import Data, Item, find_items, read_configs
from .scans import Scans

logger = logging.getLogger(__name__)

# In bfloat16 a latent is off by up to 0.4 %, which is in every target of the training; it saves little, as
# 81 frames at 832x480 take 8.4 MB in float32.
LATENTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LONGEST_STEM = 80
_HEADER = 4096  # bytes of a file beside its tensors, about
_IMAGE_TOKENS = 2 * 257  # of CLIP, for a first and a last frame


@dataclass(frozen=True)
class Planned:
    """The clips of data sets, all checked, and what encodes them."""

    encoders: Encoders
    items: Sequence[Item]
    scans: Scans

    @cached_property
    def rules(self) -> Rules:
        """What the checkpoint's clips are like."""
        return self.encoders.rules

    @property
    def buckets(self) -> dict[tuple[int, int, int], tuple[int, int]]:
        """Clips, and clips with their repeats, by frames, height and width."""
        found: dict[tuple[int, int, int], tuple[int, int]] = {}
        for item in sorted(self.items, key=lambda item: item.bucket):
            clips, repeated = found.get(item.bucket, (0, 0))
            found[item.bucket] = clips + 1, repeated + item.repeats
        return found

    def nbytes(self, item: Item, latents_dtype: str = "float32") -> int:
        """Return the bytes that a clip's file takes, at most."""
        outline = self.encoders.outline
        channels = outline.latent_channels
        if self.rules.least_frames > 1:
            channels += self.rules.stride + outline.latent_channels
        _, t, h, w = outline.latent_shape(*item.bucket)
        # No more tokens than bytes, and the end.
        tokens = min(MAX_TEXT_TOKENS, len(item.caption.encode()) + 2)
        model = outline.text_encoder
        width = getattr(getattr(model, "config", None), "d_model", 4096)
        itemsize = 4 if model is None else model.dtype.itemsize
        latents = channels * t * h * w * LATENTS_DTYPES[latents_dtype].itemsize
        image_tokens = _IMAGE_TOKENS * (_image_dim(outline) or 0) * 4
        texts = tokens * width * itemsize + 2 * len(item.caption.encode())
        return latents + image_tokens + texts + _HEADER


def _image_dim(pipe: Any) -> int | None:
    """Return the width of image tokens that a checkpoint takes; None for most."""
    return pipe.any_transformer.config.image_dim if pipe.transformers else None


@dataclass(frozen=True)
class Report:
    """What was done: clips and captions that were encoded, clips that were there, files of no use."""

    clips: CachedClips
    encoded: int
    captions: int
    kept: int
    stale: tuple[str, ...]
    pruned: bool
    seconds: float


def plan(
    source: Any,
    data: Data,
    folder: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    skip: bool = False,
    progress: bool = False,
    hub: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Planned:
    """Find and check all clips of data sets; no weights are read, and nothing is written.

    `folder` is one that was filled before, if any. See `cache` for the other arguments and for errors.
    """
    configs = read_configs(data, **settings)
    encoders = Encoders.of(source, device, dtype, hub)
    scans = Scans(None if folder is None else as_path(folder))
    return Planned(encoders, find_items(configs, encoders.rules, skip, progress, scans), scans)


def cache(source: Any, data: Data, folder: str | Path, **options: Any) -> CachedClips:
    """Encode data sets into a folder, and open it.

    Args:
        source: a pipeline with VAE (in float32), text encoder and tokenizer; or a checkpoint's folder or
            repository, of which VAE and text encoder are loaded one after the other, and no transformer.
        data: a folder, a list of files, a TOML file, or `DataConfig`s.
        folder: where the clips go; made if it is not there.
        **options: `device` and `dtype` of a checkpoint's models: by default a GPU if there is one, and text
            as stored; `skip`: leave out files that cannot be used, with a warning; `progress`: draw bars;
            `latents_dtype`: "float32" or "bfloat16", half the size and less exact; `prune`: remove files
            of the folder that no clip needs any more; `hub`: options of a download, such as revision; and
            fields of `DataConfig`, such as `resolution` and `frames`, for a folder or a list.

    Returns: the encoded clips.

    Raises:
        FileNotFoundError: a folder or a file is not there.
        ValueError: a setting breaks its rule, or files cannot be used; said before anything is encoded.
        OSError: the disk has not enough room, said before anything is encoded, or is full.
        FloatingPointError: a clip's latents are not finite.
    """
    names = ("latents_dtype", "prune")
    filling = {name: options.pop(name) for name in names if name in options}
    planned = plan(source, data, folder, **options)
    return fill(planned, folder, progress=options.get("progress", False), **filling).clips


def fill(
    planned: Planned,
    folder: str | Path,
    latents_dtype: str = "float32",
    prune: bool = False,
    progress: bool = False,
) -> Report:
    """Encode what a folder lacks, and write its index; see `cache` for arguments and errors."""
    check_choice("latents_dtype", latents_dtype, LATENTS_DTYPES)
    start, folder = time.perf_counter(), as_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{cut(folder)} is a file, not a folder")
    work = _Work(planned, folder, latents_dtype, {} if progress else {"disable": True})
    hashes = work.hashes()
    folder.mkdir(parents=True, exist_ok=True)
    planned.scans.save(folder)
    with planned.encoders.images() as pipe:
        checkpoint = work.checkpoint(mark_of(pipe.vae))
        names = work.names(hashes, checkpoint)
        missing = [(item, name) for item, name in names if work.header(name) is None]
        check_room(folder, sum(planned.nbytes(item, latents_dtype) for item, _ in missing))
        work.encode_clips(pipe, missing, hashes, checkpoint)
    captions, checkpoint["text_encoder"] = work.encode_captions(names)
    write_index(folder, checkpoint, [(name, item.repeats) for item, name in names])
    stale = work.stale({name for _, name in names})
    for name in stale if prune else ():
        (folder / name).unlink(missing_ok=True)
    clips = CachedClips.open(folder)
    seconds = time.perf_counter() - start
    return Report(clips, len(missing), captions, len(names) - len(missing), stale, prune, seconds)


Names = Sequence[tuple[Item, str]]  # clips, and the names of their files


@dataclass(frozen=True)
class _Work:
    """The steps of filling a folder; `bars` are options of progress bars."""

    planned: Planned
    folder: Path
    latents_dtype: str
    bars: Mapping[str, Any]

    def hashes(self) -> dict[Path, str]:
        """Return the hash of each source file."""
        files = list(dict.fromkeys(item.file for item in self.planned.items))
        return {file: self.planned.scans.sha256(file) for file in self._bar(files, "hashing files", "file")}

    def checkpoint(self, vae: str) -> dict[str, Any]:
        """Return what the clips are encoded for, without the text encoder's mark."""
        rules, outline = self.planned.rules, self.planned.encoders.outline
        versions = {"wan22": __version__, "torch": torch.__version__, "diffusers": version("diffusers")}
        return {
            "kind": rules.kind,
            "name": outline.checkpoint_name,
            "vae": vae,
            "latents_dtype": self.latents_dtype,
            "fps": rules.fps,
            "versions": versions,
        }

    def names(self, hashes: Mapping[Path, str], checkpoint: Mapping[str, Any]) -> Names:
        """Return each clip with the name of its file, in which everything counts that its latents are of."""
        found, seen = [], Counter[str]()
        for item in self.planned.items:
            frames, height, width = item.bucket
            made_of = f"{FORMAT} {hashes[item.file]} {item.numbers} {width}x{height} " + " ".join(
                str(checkpoint[name]) for name in ("kind", "vae", "latents_dtype")
            )
            mark = hashlib.sha256(made_of.encode()).hexdigest()[:12]
            stem = re.sub(r"[^\w.-]+", "_", item.file.stem)[:_LONGEST_STEM]
            name = f"{stem}_{item.start:05d}-{frames:03d}_{width}x{height}_{mark}"
            seen[name] += 1  # a clip may be listed more than once, with several captions
            found.append((item, f"{name}{'' if seen[name] == 1 else f'_{seen[name]}'}.safetensors"))
        return found

    def header(self, name: str) -> Header | None:
        """Return the header of a file that is there and whole."""
        try:
            return Header.read(self.folder / name)
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("encoding again: %s", error)
            return None

    def encode_clips(
        self, pipe: Any, names: Names, hashes: Mapping[Path, str], checkpoint: Mapping[str, Any]
    ) -> None:
        """Write the files of clips, without captions."""
        groups: dict[Any, dict[int, str]] = defaultdict(dict)  # numbers and names of clips, by file and size
        for number, (item, name) in enumerate(names):
            groups[item.file, item.bucket[1:]][number] = name
        dtype, kind = LATENTS_DTYPES[self.latents_dtype], self.planned.rules.kind
        with self._bar(None, "encoding clips", "clip", total=len(names)) as bar:
            for group in groups.values():
                for number, frames in clips_of_file({number: names[number][0] for number in group}):
                    item = names[number][0]
                    try:
                        tensors = encode_clip(pipe, kind, frames)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"{cut(item.file)}: {error}") from error
                    for name in tensors.keys() & {"latents", "condition"}:
                        tensors[name] = tensors[name].to(dtype)
                    metadata = self._metadata(item, hashes[item.file], checkpoint)
                    _write(self.folder / group[number], tensors, metadata)
                    bar.update()

    def _metadata(self, item: Item, mark: str, checkpoint: Mapping[str, Any]) -> dict[str, str]:
        """Return what a file says of its clip: texts, as safetensors has them."""
        frames, height, width = item.bucket
        last = item.start + frames - 1
        found = {
            "format": FORMAT,
            "name": item.file.name if item.video is None else f"{item.file.name}, frames {item.start}-{last}",
            "source_sha256": mark,
            "first_frame": item.start,
            "num_frames": frames,
            "width": width,
            "height": height,
            "checkpoint": checkpoint["name"],
            **{name: checkpoint[name] for name in ("kind", "vae", "fps", "versions")},
        }
        return {name: str(value) for name, value in found.items()}

    def encode_captions(self, names: Names) -> tuple[int, str]:
        """Write the captions that are not there, or others; return their number, and the encoder's mark."""
        wanted: dict[str, list[str]] = {"": [EMPTY]}
        for item, name in names:
            wanted.setdefault(item.caption, []).append(name)
        there = {name: self._text_there(name) for files in wanted.values() for name in files}
        marks = {mark for _, mark in there.values()}
        complete = all(there[name][0] == caption for caption, files in wanted.items() for name in files)
        if complete and len(marks) == 1 and self._is_mark(mark := marks.pop()):
            return 0, mark
        with self.planned.encoders.texts() as pipe:
            mark = mark_of(pipe.text_encoder)
            left = [
                (caption, missing)
                for caption, files in wanted.items()
                if (missing := [name for name in files if there[name] != (caption, mark)])
            ]
            for caption, files in self._bar(left, "encoding captions", "caption"):
                text = encode_caption(pipe, caption)
                for name in files:
                    self._write_text(name, caption, text, mark)
        return sum(1 for caption, _ in left if caption), mark

    def _is_mark(self, mark: str) -> bool:
        """Return whether a mark is that of the text encoder.

        One that is not loaded is large, and is not loaded for nothing: there the dtype alone tells.
        """
        encoders, model = self.planned.encoders, self.planned.encoders.outline.text_encoder
        if encoders.source is None:
            return mark == mark_of(model)
        return model is None or mark.startswith(f"{str(model.dtype).removeprefix('torch.')}:")

    def _text_there(self, name: str) -> tuple[str | None, str]:
        """Return the caption of a file, None without, and the mark of what encoded it."""
        header = self.header(name)
        if header is None or "text" not in header.shapes:
            return None, ""
        return header.metadata.get("caption"), header.metadata.get("text_encoder", "")

    def _write_text(self, name: str, caption: str, text: torch.Tensor, mark: str) -> None:
        """Write a file anew, with another text; the file of the empty caption has nothing else."""
        path = self.folder / name
        tensors, metadata = ({}, {"format": FORMAT}) if name == EMPTY else read_safetensors(path)
        _write(path, {**tensors, "text": text}, {**metadata, "caption": caption, "text_encoder": mark})

    def stale(self, names: set[str]) -> tuple[str, ...]:
        """Return the files of ours that no clip needs, and what a kill has left half written."""
        found = []
        for path in sorted(self.folder.iterdir()):
            clip = path.suffix == ".safetensors" and path.name not in names | {EMPTY}
            if is_temporary(path) or (clip and _is_ours(path)):
                found.append(path.name)
        return tuple(found)

    def _bar(self, iterable: Any, desc: str, unit: str, total: int | None = None) -> Any:
        return progress_bar(iterable, total, desc=desc, unit=unit, **self.bars)


def _is_ours(path: Path) -> bool:
    """Return whether a file is an encoded clip, cut off or not; others are left alone."""
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(2**16)


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a clip's file, whole or not at all; an OSError says that the disk is full, and names the file."""
    # Not save_file: what it raises where a disk is full is not an OSError.
    data = save(dict(tensors), dict(metadata))
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
