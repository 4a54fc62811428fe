"""A result that takes long to write: unfinished beside its final name, and with a journal.

The journal has a JSON object a line: what the result is to become, who writes it, which files are finished.
So the next call can go on after any kill. It is also the lock that gives a destination one writer, and goes
when the result has its name.
"""

import json
import logging
import os
import shutil
import socket
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checks import as_path, cut
from ...whole_files import is_temporary, lock, rename_exclusively, sync_folder, sync_tree

logger = logging.getLogger(__name__)

_FIRST = b'{"wan22": "journal of an unfinished result", "version": 1}\n'
_KEPT = ("size", "mtime_ns")  # of a file's state: what stays when it gets another name
_POLL_SECONDS = 1  # between two looks at a journal on a file system without locks


@dataclass
class _Known:
    """What a journal says."""

    request: dict[str, Any] | None = None
    writer: dict[str, Any] | None = None  # None also if it has ended and said so
    finished: dict[str, dict[str, int]] = field(default_factory=dict)  # states of files by their paths
    complete: bool = False
    size: int = 0  # bytes of the lines that count


class Unfinished:
    """A folder, or the one file in it, before it has its final name; as a context, this process writes it.

    Args:
        target: the final name.
        request: all that the result depends on, in JSON's types.
        single: whether the one file in the folder gets the name, not the folder.
        waits: whether to wait for another process that writes it; otherwise there is a FileExistsError.
    """

    def __init__(
        self, target: Path, request: Mapping[str, Any], single: bool = False, waits: bool = False
    ) -> None:
        self.target, self.single, self.waits = target, single, waits
        self.folder, self.journal = as_path(f"{target}.partial"), journal_of(target)
        self._request = json.loads(json.dumps(request))
        self._handle = -1
        self._writes = self._ended = False
        self._known = _parse(_journal_at(self.journal))

    def __enter__(self) -> "Unfinished":
        """Become the one writer; nothing is written yet."""
        self._made = [place for place in self.journal.parents if not place.exists()]
        self._handle = self._locked()
        return self

    def __exit__(self, *_: Any) -> None:
        """Leave it to others; what is finished stays for the next call."""
        try:
            if self._writes and self.folder.exists():
                with suppress(OSError):  # as on a full disk
                    self._append(writer=None)
            elif not self._ended and (self._writes or not self._known.size):
                self._remove_journal()
                with suppress(OSError):  # somebody uses the folder by now
                    for place in self._made:
                        place.rmdir()
        finally:
            if self._handle >= 0:
                os.close(self._handle)

    # ---- what is there ----

    def has(self, path: str) -> bool:
        """Return whether a file of the result is finished, and nobody has touched it since."""
        return path in self._known.finished and self._known.finished[path] == _state(self.folder / path)

    @property
    def placed(self) -> bool:
        """Whether the result has its name already, and only `clear` is left to do."""
        if not self._known.complete or self._known.request != self._request:
            return False
        for path, state in self._known.finished.items():
            found = _state(self.target if self.single else self.target / path)
            if found is None or any(found[key] != state.get(key) for key in _KEPT):
                return False
        return True

    def check(self, paths: Collection[str]) -> None:
        """Refuse what is in the way; a FileExistsError names it.

        Args:
            paths: all files of the result, by their places in the folder.
        """
        check_absent(self.target)
        if not os.path.lexists(self.folder):
            return
        if self._known.request is None or self.folder.is_symlink() or not self.folder.is_dir():
            rule = "is not known to be an unfinished conversion, as it has no journal"
            raise FileExistsError(f"{self.folder} {rule}; choose another name, or delete it")
        begun = self._known.request
        if different := [name for name, value in self._request.items() if begun.get(name) != value]:
            raise FileExistsError(
                f"{self.folder} is what another conversion left, one of another {' and '.join(different)}; "
                "finish it by its own command, or delete it"
            )
        own = {self.folder / path for path in paths}
        for path in _inside(self.folder):
            if path.is_symlink() or not (path in own or is_temporary(path)):
                rule = "is no part of the conversion; move it away, and the same command goes on"
                raise FileExistsError(f"{cut(path)} {rule}")

    # ---- writing ----

    def begin(self) -> None:
        """Record who writes what; what a kill has left half written is removed."""
        self._writes = True
        if self.folder.exists():
            os.ftruncate(self._handle, self._known.size)
            if self._known.writer is not None:
                logger.warning("%s: going on with what %s left", self.folder, _told(self._known.writer))
            for path in filter(is_temporary, _inside(self.folder)):
                path.unlink()
        else:
            os.ftruncate(self._handle, 0)
            self._known = _Known()
            _write(self._handle, _FIRST)
            self._append(request=self._request)
            sync_folder(self.journal.parent)
            self.folder.mkdir()
        self._append(writer=_identity())

    def add(self, path: str) -> None:
        """Record that a file is finished."""
        self._known.finished[path] = state = _state(self.folder / path) or {}
        self._append(file=path, state=state)

    def place(self) -> None:
        """Give the result its name; a FileExistsError says that somebody else has taken it meanwhile."""
        sync_tree(self.folder)
        self._append(complete=True)
        check_absent(self.target)
        try:
            if self.single:
                rename_exclusively(self.folder / self.target.name, self.target)
            else:
                self.folder.rename(self.target)
        except OSError:
            check_absent(self.target)
            raise
        self.clear()

    def clear(self) -> None:
        """Remove what is left when the result has its name."""
        sync_folder(self.target.parent)
        if self.single and self.folder.exists():
            (self.folder / self.target.name).unlink(missing_ok=True)  # a kill may leave both names
            self.folder.rmdir()
        self._remove_journal()

    def discard(self) -> None:
        """Remove all that is written, because going on with it would not help."""
        if self._writes:
            shutil.rmtree(self.folder)
            self._remove_journal()

    # ---- the journal ----

    def _append(self, **entry: Any) -> None:
        try:
            _write(self._handle, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.journal)) from error

    def _remove_journal(self) -> None:
        if os.name == "nt":  # where an open file cannot be removed
            os.close(self._handle)
            self._handle = -1
        self.journal.unlink()
        self._writes, self._ended = False, True

    # ---- one writer ----

    def _locked(self) -> int:
        """Return the journal, open and read, as soon as no other process has it; it is made if need be."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        while True:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            _journal_at(self.journal)
            try:
                handle = os.open(self.journal, flags, 0o666)
            except FileNotFoundError:  # another process has made the folder, too, and removed it
                continue
            try:
                self._wait_for_others(handle)
                if self._is_at_its_name(handle):  # nobody has finished meanwhile, and removed it
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _wait_for_others(self, handle: int) -> None:
        """Lock the journal, and read it; or raise the error that another process has it."""
        alone = lock(handle, wait=False)
        self._known = _parse(_contents(handle))
        if alone or (alone is None and not _is_running(self._known.writer)):
            return
        who = _told(self._known.writer)
        if not self.waits:
            rule = "wait for it, or choose another name"
            raise FileExistsError(f"{self.target} is being written by {who}; {rule}")
        logger.warning("%s is being written by %s; waiting for it", self.target, who)
        while (alone := lock(handle, wait=True)) is None and _is_running(self._known.writer):
            time.sleep(_POLL_SECONDS)
            self._known = _parse(_contents(handle))
            if not self._is_at_its_name(handle):
                return
        self._known = _parse(_contents(handle))

    def _is_at_its_name(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.journal))
        except FileNotFoundError:
            return False


def journal_of(target: Path) -> Path:
    """Return where the journal of an unfinished result is."""
    return as_path(f"{target}.partial.journal")


def check_absent(target: Path) -> None:
    """Refuse a name that is taken."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already; choose another name, or delete it")


def _journal_at(path: Path) -> bytes:
    """Return what is in a journal, nothing if it is not there; refuse anything else of its name."""
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            with path.open("rb") as file:
                head = file.read(len(_FIRST))
                if _FIRST.startswith(head):
                    return head + file.read()
    except FileNotFoundError:
        return b""
    raise FileExistsError(
        f"{path} is no journal of an unfinished result; move it away, or choose another name"
    )


def _table(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _parse(text: bytes) -> _Known:
    """Read a journal; a line that is half written, and what follows it, does not count."""
    known = _Known()
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        known.size += len(line)
        known.request = _table(entry.get("request", known.request))
        known.writer = _table(entry.get("writer", known.writer))
        known.complete |= "complete" in entry
        if "file" in entry:
            known.finished[str(entry["file"])] = _table(entry.get("state")) or {}
    return known


def _contents(handle: int) -> bytes:
    os.lseek(handle, 0, os.SEEK_SET)
    with os.fdopen(os.dup(handle), "rb") as file:
        return file.read()


def _write(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def _state(path: Path) -> dict[str, int] | None:
    """Return what changes when a file does; None if it is not there."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):  # ValueError: no name that a system has
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    # Nobody sets the last at will.
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and those in it, and links to folders, which are not followed."""
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in names)
        yield from (path for name in folders if (path := Path(place, name)).is_symlink())


# ---- processes ----


def _identity() -> dict[str, Any]:
    """Return what tells this process from any other, and when it begins to write."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "since": since,
    }


def _started(pid: Any) -> str | None:
    """Return when a process of this machine has started, as its kernel counts; None if nobody can say."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _is_running(writer: Mapping[str, Any] | None) -> bool:
    """Return whether a writer may still be at work, where no lock tells."""
    if writer is None:
        return False
    if writer.get("host") != socket.gethostname():
        return True  # nobody here can say
    return writer.get("started") is not None and _started(writer.get("pid")) == writer["started"]


def _told(writer: Mapping[str, Any] | None) -> str:
    if writer is None:  # it has the lock, and is about to say who it is
        return "another process"
    return cut(f"process {writer.get('pid')} on {writer.get('host')}, since {writer.get('since')},")
