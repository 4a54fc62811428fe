"""Repositories of the hub: their names, addresses of files, the options of a download, known folders."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, hf_hub_download

from ...checks import as_path
from ...downloads import OPTIONS as OPTIONS
from ...downloads import reaching
from .weights import SUFFIXES

EXPERTS = ("high_noise_model", "low_noise_model")  # their folders in the official layout
TOKENIZERS = ("google/umt5-xxl", "tokenizer")  # its folder in the official layout, and in Diffusers'

_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_ACTIONS = {"blob", "resolve", "raw"}  # between a repository's name and the revision
_REVISION = re.compile(r"((?:refs/(?:pr|convert)/)?[^/]+)/(.+)")


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the hub."""

    repository: str  # "org/name"
    path: str  # in the repository
    revision: str | None = None

    def download(self, **options: Any) -> Path:
        """Return where the file is here, after its download; `options` are some of OPTIONS.

        A FileNotFoundError says that it is not there, or that the hub cannot be reached.
        """
        options["revision"] = options.get("revision") or self.revision
        with reaching(self.repository, self.path, options):
            return Path(hf_hub_download(self.repository, self.path, **options))


def hub_file(source: str) -> HubFile | None:
    """Return the file of the hub that an address names; None for anything else, such as a path.

    Addresses are those that a browser shows, https://huggingface.co/org/name/blob/main/file, or `resolve` in
    place of `blob`; and org/name/file, if the file is named like weights. A ValueError says that a URL is of
    another site, or names no file.
    """
    url = urlsplit(source)
    if url.scheme in ("http", "https"):
        host, path = url.netloc.lower(), unquote(url.path)
    else:
        host, _, path = source.partition("/")
        if host not in _HOSTS:
            known = source.endswith(SUFFIXES) and source.count("/") > 1 and source[0] not in "./~\\"
            return _file(source) if known and "\\" not in source else None
    if host not in _HOSTS | {urlsplit(constants.ENDPOINT).netloc.lower()}:
        raise ValueError(
            f"{source[:200]} is not on huggingface.co; download the file, and give the path that it has here"
        )
    file = _file(path)
    if file is None:
        rule = "https://huggingface.co/<owner>/<repository>/blob/<revision>/<file>"
        raise ValueError(f"{source[:200]} names no file of a repository; its address is like {rule}")
    return file


def _file(path: str) -> HubFile | None:
    owner, _, rest = path.strip("/").partition("/")
    name, _, rest = rest.partition("/")
    action, _, place = rest.partition("/")
    if action in _ACTIONS:
        found = _REVISION.fullmatch(place)
        return HubFile(f"{owner}/{name}", found[2], found[1]) if found else None
    return HubFile(f"{owner}/{name}", rest) if rest and action not in ("tree", "commit") else None


def local_file(source: str | Path, **options: Any) -> Path:
    """Return where a file or folder is here: what an address on the hub names is downloaded.

    `options` are some of OPTIONS. A path that is neither here nor an address is returned as it is.
    """
    path = as_path(source)
    if path.exists() or isinstance(source, Path):
        return path
    file = hub_file(source)
    return path if file is None else file.download(**options)


def is_repository_name(source: str) -> bool:
    """Return whether something that is no path here can be a repository's name."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def check_repository_name(source: str, what: str = "folder") -> None:
    """Raise FileNotFoundError for a path that is not here and cannot be a repository's name."""
    if not is_repository_name(source):
        if Path(source).is_file():
            raise FileNotFoundError(f"{source} is a file, not a {what}; from_single_file loads files")
        raise FileNotFoundError(f"there is no {what} {source}, and a repository's name is like org/name")
