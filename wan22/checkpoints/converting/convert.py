"""Convert checkpoints between the Diffusers layout, the official one, and single files.

The names of the tensors come from the loader's tables. Memory holds one tensor at a time: sources are
memory-mapped, and files are written tensor by tensor.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ... import __version__
from ...checks import as_path, check_choice, parse_bytes
from ...downloads import reaching
from ..files.fingerprint import fingerprint
from ..files.hub import is_repository_name
from ..files.safetensors import as_bytes
from ..files.weights import SUFFIXES
from ..loading.dtypes import read_dtype
from .plan import LAYOUTS, Plan, make_plan
from .source import Source, read_source
from .unfinished import Unfinished, check_absent, journal_of
from .writing import write_plan

SHARD_SIZE = "5GB"
_NOT_CONVERTED = ["*.md", "*.py", "*.mp4", "*.png", "*.jpg", "*.gif", "assets/*", "examples/*"]


def plan(
    source: str | Path,
    destination: str | Path,
    to: str,
    dtype: torch.dtype | str | None = None,
    shard_size: int | str = SHARD_SIZE,
    attention_head_dim: int | None = None,
) -> Plan:
    """Return what `convert` with the same arguments would write; its `describe()` has a line per tensor."""
    return _prepare(source, destination, to, dtype, shard_size, attention_head_dim)[1]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    dtype: torch.dtype | str | None = None,
    shard_size: int | str = SHARD_SIZE,
    attention_head_dim: int | None = None,
    verify: bool = False,
    progress: bool = False,
) -> Path:
    """Write a checkpoint, or one model of it, in another layout, dtype or size of shards.

    The result is built in a folder beside the destination, whose name ends in ".partial", and gets its name
    when it is complete. A journal beside it lets the same call go on with the file at which another was
    interrupted or killed, and no second process write to the same destination.

    Args:
        source: repository, of the hub or a folder, in the Diffusers or the official layout; folder of single
            files; one model's folder or file: safetensors, scaled float8 too, .pth, or GGUF.
        destination: folder that is not there yet; for one model to "single-file", a file that ends in
            .safetensors. It is returned.
        to: "diffusers", "official", or "single-file": official names, and of a repository one file per model.
        dtype: dtype of all tensors, or "bf16", "fp16", "fp32"; None: as they are stored, bfloat16 for those
            that are quantised.
        shard_size: largest file, such as "5GB", or in bytes; single files and .pth are not divided.
        attention_head_dim: size of a transformer's head where the source does not have it; None: 128.
        verify: whether to read the result again and compare each tensor with the source.
        progress: whether to show a bar.

    Raises:
        FileExistsError: the destination is there, or another process writes it, or beside it is a different
            conversion's unfinished folder.
        FileNotFoundError: the source or a part of it is missing.
        OSError: the disk has not enough room.
        ValueError: an argument has a wrong value, the source holds what has no place or changes meanwhile,
            or (verify) a tensor is not as it should be.
    """
    found, work, request = _prepare(source, destination, to, dtype, shard_size, attention_head_dim)
    target = as_path(destination)
    single = to == "single-file" and not found.whole
    with Unfinished(target, request, single) as unfinished:
        if unfinished.placed:  # by a call that ended before it could say so
            unfinished.clear()
            return target
        try:
            write_plan(work, unfinished, target.name, disable=not progress, delay=0)
            if verify:
                _verify(found, work, unfinished.folder)
            _check_unchanged(found, request["source"])
        except ValueError:
            unfinished.discard()  # to go on would not help
            raise
        unfinished.place()
    return target


def _prepare(
    source: str | Path,
    destination: str | Path,
    to: str,
    dtype: torch.dtype | str | None,
    shard_size: int | str,
    attention_head_dim: int | None,
) -> tuple[Source, Plan, dict[str, Any]]:
    """Check all arguments and read the source's headers; return source, plan, and the request in short."""
    check_choice("to", to, LAYOUTS)
    dtype = read_dtype(dtype)
    size = parse_bytes(shard_size, "shard_size")
    target = as_path(destination)
    if not journal_of(target).exists():
        check_absent(target)
    origin = as_path(source)
    if not origin.exists() and is_repository_name(str(source)):  # downloaded first
        with reaching(str(source)):
            origin = Path(snapshot_download(str(source), ignore_patterns=_NOT_CONVERTED))
    if origin.resolve() in target.resolve().parents:
        raise ValueError(f"{target} lies inside of what is to be converted, {origin}; choose another place")
    found = read_source(origin, attention_head_dim)
    one = to == "single-file" and not found.whole
    if target.suffix in SUFFIXES and not one:
        raise ValueError(f"{target} is to be a folder, the {to} layout's; leave {target.suffix} off its name")
    if one and target.suffix != ".safetensors":
        rule = "is to be one file; its name must end in .safetensors"
        raise ValueError(f"{target} {rule}, as {target.name}.safetensors does")
    request = {"source": _stamp(found), "to": to, "dtype": str(dtype), "shard_size": size}
    request |= {"attention_head_dim": attention_head_dim, "version of wan22": __version__}
    return found, make_plan(found, to, target.name, dtype, size), request


def _stamp(source: Source) -> dict[str, Any]:
    """Return what changes when a source does."""
    paths = {path.resolve() for model in source.models.values() for path in model.paths}
    root = source.path
    weights, others = {}, {}
    for file in [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file()):
        place, found = file.relative_to(root), file.stat()
        if file.resolve() in paths:
            weights[place.as_posix()] = [found.st_size, found.st_mtime_ns, fingerprint(file)]
        elif not any(part.startswith(".") for part in place.parts):  # as Git's, and downloads' own
            others[place.as_posix()] = [found.st_size, found.st_mtime_ns]
    return {"path": str(root.resolve()), "weights": weights, "others": others}


def _check_unchanged(source: Source, stamp: dict[str, Any]) -> None:
    """Refuse weights that somebody has changed while they were read."""
    now = _stamp(source)["weights"]
    if changed := [name for name, values in stamp["weights"].items() if now.get(name) != values]:
        rule = "changed while it was converted; convert again when nobody writes to it"
        raise ValueError(f"{source.path / changed[0]} {rule}")


def _verify(source: Source, work: Plan, folder: Path) -> None:
    """Read a result with the loader, and refuse the first tensor that differs from the source."""
    head_dims = [model.settings.get("attention_head_dim") for model in source.models.values()]
    written = read_source(folder, next((size for size in head_dims if size), None))
    for file in work.files:
        for tensor in file.tensors:
            there = written.models[tensor.component].tensors[tensor.name]
            expected = tensor.values()
            if (
                not isinstance(there, torch.Tensor)
                or (there.dtype, there.shape) != (expected.dtype, expected.shape)
                or not torch.equal(as_bytes(there), as_bytes(expected))
            ):
                raise ValueError(f"{file.path}: {tensor.key} differs from {tensor.origin} of {source.path}")
