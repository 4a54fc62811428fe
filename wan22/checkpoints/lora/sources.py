"""Where a LoRA is: a file, a folder or repository, an address, a pair for the two experts, a table."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

from ...checks import LONGEST, cut, listed
from ...downloads import reaching
from ..files.fingerprint import fingerprint
from ..files.hub import check_repository_name, hub_file
from ..files.weights import SUFFIXES, WeightFile, read_weights, weight_files
from .scales import CONFIG

logger = logging.getLogger(__name__)

# How pairs for the two experts are named; Lightning's are so.
_PAIR = ("high_noise_model.safetensors", "low_noise_model.safetensors")
# The names, without endings, that diffusers and PEFT give a LoRA's file. The configuration is PEFT's.
_DIFFUSERS, _PEFT = "pytorch_lora_weights", "adapter_model"
TABLE = "the given table"


@dataclass(frozen=True)
class LoraSource:
    """A LoRA's file in a folder or repository: its name (None: the only one), subfolder, hub options."""

    weight_name: str | None
    subfolder: str | None
    hub: dict[str, Any]

    def files_of(self, source: str | Path) -> list[str]:
        """Return the names of the weight files there: safetensors, or if there are none, others."""
        here = [path for path in self._paths(source) if path.parent == PurePosixPath()]
        best = [path for path in here if path.suffix == ".safetensors"] or here
        return sorted(path.name for path in best)

    def fetch(self, source: str | Path, name: str) -> Path:
        """Return the path of one of these files, downloading it first from a repository.

        A FileNotFoundError lists the files that are there.
        """
        folder, reason = Path(source).expanduser(), ""
        if folder.is_dir():
            path = folder / (self.subfolder or "") / name
        else:
            check_repository_name(str(source), "file")
            path, reason = self._download(source, name)
            if path.stem == _PEFT or (self.weight_name is None and name not in _PAIR):
                self._download(source, CONFIG)  # beside the file
        if path.is_file():
            return path
        raise FileNotFoundError(f"{self._place(source)} has no {name}{self._others(source)}{reason}")

    def only_file(self, source: str | Path) -> str:
        """Return the name of the only weight file there, or of the only one that is named like a LoRA.

        A FileNotFoundError lists the files that are there.
        """
        names = self.files_of(source)
        best = [name for name in names if Path(name).stem in (_DIFFUSERS, _PEFT)] if len(names) > 1 else names
        if len(best) == 1:
            return best[0]
        if names:
            raise FileNotFoundError(
                f"{self._place(source)} holds {listed(names)}; give weight_name, one of them"
            )
        raise FileNotFoundError(f"{self._place(source)} holds no weight file{self._others(source)}")

    def in_folder(self) -> "LoraSource":
        """Return the same source with the folder in the file's name as a subfolder."""
        path = PurePosixPath(self.subfolder or "", self.weight_name or "")
        folder = "" if path.parent == PurePosixPath() else str(path.parent)
        return replace(self, weight_name=path.name, subfolder=folder) if self.weight_name else self

    def _paths(self, source: str | Path) -> list[PurePosixPath]:
        """Return the weight files in the subfolder and below; of a folder here, those one below."""
        folder = Path(source).expanduser()
        if not folder.is_dir():
            check_repository_name(str(source), "file")
            try:
                names = map(PurePosixPath, self._listed(str(source)))
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"there is no file or folder {source}, nor can a repository of that name be listed: "
                    f"{cut(error)}"
                ) from error
            paths = [path for path in names if path.is_relative_to(self.subfolder or "")]
            return [path.relative_to(self.subfolder or "") for path in paths if path.suffix in SUFFIXES]
        base = folder / (self.subfolder or "")
        found = (path for pattern in ("*", "*/*") for path in base.glob(pattern))
        return [PurePosixPath(path.relative_to(base)) for path in found if path.suffix in SUFFIXES]

    def _listed(self, repository: str) -> list[str]:
        """Return a repository's files; without the hub, those that are here already."""
        try:
            if not self.hub.get("local_files_only"):
                with reaching(repository, options=self.hub):
                    return list_repo_files(repository, **self._options("revision", "token"))
            unreachable = None
        except OSError as error:
            unreachable = error
        try:
            options = self._options("revision", "cache_dir")
            with reaching(repository, options={**self.hub, "local_files_only": True}):
                here = Path(snapshot_download(repository, local_files_only=True, **options))
        except OSError as error:
            raise unreachable or error from error
        return [path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()]

    def _download(self, source: str | Path, name: str) -> tuple[Path, str]:
        """Return where a file of a repository is here, and why it is not."""
        try:
            with reaching(str(source), name, self.hub):
                path = hf_hub_download(str(source), name, subfolder=self.subfolder or None, **self.hub)
        except FileNotFoundError as error:
            return Path(name), f": {cut(error)}"
        return Path(path), ""

    def _others(self, source: str | Path) -> str:
        """Return what an error says of the files that are there instead."""
        try:
            paths = sorted(self._paths(source))
        except FileNotFoundError:  # offline, or no such repository
            return ""
        if names := [path.name for path in paths if path.parent == PurePosixPath()]:
            return f"; there is {listed(names)}"
        if folders := {str(path.parent) for path in paths}:
            return f"; there are some in {listed(folders)}, to be given as subfolder"
        return ""

    def _place(self, source: str | Path) -> str:
        return f"{source}, {self.subfolder}," if self.subfolder else str(source)

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: self.hub[name] for name in names if name in self.hub}


def read_source(source: Any, where: LoraSource) -> WeightFile:
    """Read a LoRA's file; from a folder or a repository, the one of the name asked for, or the only one.

    PEFT's configuration beside it is read, too, into the metadata. A FileNotFoundError names what is missing.
    """
    if isinstance(source, Mapping):
        return WeightFile(TABLE, dict(source))
    source, where = _located(source, where)
    path = Path(source).expanduser()
    if not path.is_file():
        path = where.fetch(source, where.weight_name or where.only_file(source))
    return _with_configuration(path)


def pair_in(source: Any, where: LoraSource) -> tuple[Path, Path] | None:
    """Return the two experts' files in a folder or repository, if it holds such a pair."""
    if isinstance(source, Mapping) or where.weight_name:
        return None
    source, where = _located(source, where)
    if (
        Path(source).expanduser().is_file()
        or where.weight_name
        or not set(_PAIR) <= set(where.files_of(source))
    ):
        return None
    return where.fetch(source, _PAIR[0]), where.fetch(source, _PAIR[1])


def warn_if_swapped(high: Any, low: Any) -> None:
    """Warn if the files for the high-noise and the low-noise expert have each other's names."""
    names = [Path(s).name.lower() if isinstance(s, str | Path) else "" for s in (high, low)]
    if re.search(r"low.?noise|_low\b|-low\b", names[0]) or re.search(
        r"high.?noise|_high\b|-high\b", names[1]
    ):
        logger.warning("high=%s and low=%s look swapped by their names", *names)


def _located(source: str | Path, where: LoraSource) -> tuple[str | Path, LoraSource]:
    """Return a path, or a repository in place of the address of a file in it, with the file's place there."""
    try:
        here = Path(source).expanduser().exists()
    except OSError:  # a name that no file can have
        here = False
    if not here and len(str(source)) > LONGEST:
        raise FileNotFoundError(f"there is no file {cut(source)}")
    if here or isinstance(source, Path):
        return source, where.in_folder()
    file = hub_file(source)
    if file is None:
        return source, where.in_folder()
    revision = {"revision": file.revision} if file.revision and not where.hub.get("revision") else {}
    return file.repository, LoraSource(file.path, "", where.hub | revision).in_folder()


def lora_fingerprint(path: Path) -> str:
    """Return a hash of what a LoRA's file, and the configuration that counts with it, say."""
    config = _configuration(path)
    marks = [fingerprint(path), *([hashlib.sha256(config.read_bytes()).hexdigest()] if config else [])]
    return "+".join(marks)


def _configuration(path: Path) -> Path | None:
    """Return PEFT's configuration of a weight file: beside it, if it is PEFT's or the folder's only one."""
    config = path.with_name(CONFIG)
    own = config.is_file() and (path.stem == _PEFT or weight_files(path.parent) == [path])
    return config if own else None


def _with_configuration(path: Path) -> WeightFile:
    file, config = read_weights(path), _configuration(path)
    if config is None:
        return file
    try:
        table = json.loads(config.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{config} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{config} is a {type(table).__name__}, no table")
    return replace(file, metadata={**file.metadata, CONFIG: table})
