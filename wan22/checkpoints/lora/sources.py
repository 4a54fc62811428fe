"""Where a LoRA is: a file, a folder or repository that holds it, a pair for the two experts, a table."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, list_repo_files

from ..files.hub import check_repository_name
from ..files.weights import WeightFile, read_weights

logger = logging.getLogger(__name__)

# How pairs for the two experts are named; Lightning's are so.
_PAIR = ("high_noise_model.safetensors", "low_noise_model.safetensors")
TABLE = "the given table"


@dataclass(frozen=True)
class LoraSource:
    """A LoRA's file in a folder or repository: its name (None: the only one), subfolder, hub options."""

    weight_name: str | None
    subfolder: str
    hub: dict[str, Any]

    def files_of(self, source: str | Path) -> list[str]:
        """Return the names of the safetensors files there."""
        folder = Path(source).expanduser()
        if folder.is_dir():
            return sorted(path.name for path in (folder / self.subfolder).glob("*.safetensors"))
        check_repository_name(str(source), "file")
        paths = map(PurePosixPath, list_repo_files(str(source), **self._options("revision", "token")))
        here = [path for path in paths if path.parent == PurePosixPath(self.subfolder)]
        return sorted(path.name for path in here if path.suffix == ".safetensors")

    def fetch(self, source: str | Path, name: str) -> Path:
        """Return the path of one of these files, downloading it first from a repository."""
        folder = Path(source).expanduser()
        if folder.is_dir():
            return folder / self.subfolder / name
        return Path(hf_hub_download(str(source), name, subfolder=self.subfolder or None, **self.hub))

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: self.hub[name] for name in names if name in self.hub}


def read_source(source: Any, where: LoraSource) -> WeightFile:
    """Read a LoRA's file; from a folder or a repository, the one of the name asked for, or the only one."""
    if isinstance(source, Mapping):
        return WeightFile(TABLE, dict(source))
    path = Path(source).expanduser()
    if path.is_file():
        return read_weights(path)
    names = where.files_of(source)
    if where.weight_name in names or (where.weight_name is None and len(names) == 1):
        return read_weights(where.fetch(source, where.weight_name or names[0]))
    raise FileNotFoundError(
        f"{source} holds {', '.join(names) or 'no safetensors file'}; "
        + ("give weight_name, one of them" if where.weight_name is None else f"not {where.weight_name}")
    )


def pair_in(source: Any, where: LoraSource) -> tuple[Path, Path] | None:
    """Return the two experts' files in a folder or repository, if it holds such a pair."""
    if isinstance(source, Mapping) or Path(source).expanduser().is_file() or where.weight_name:
        return None
    if not set(_PAIR) <= set(where.files_of(source)):
        return None
    return where.fetch(source, _PAIR[0]), where.fetch(source, _PAIR[1])


def warn_if_swapped(high: Any, low: Any) -> None:
    """Warn if the files for the high-noise and the low-noise expert have each other's names."""
    names = [Path(s).name.lower() if isinstance(s, str | Path) else "" for s in (high, low)]
    if re.search(r"low.?noise|_low\b|-low\b", names[0]) or re.search(
        r"high.?noise|_high\b|-high\b", names[1]
    ):
        logger.warning("high=%s and low=%s look swapped by their names", *names)
