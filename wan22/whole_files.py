"""Files that are written whole or not at all, and take no other file's place unasked."""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What the errors of a system say that has no room for a file, or for one of this size.
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "no larger file is allowed here",
}
_TEMPORARY = re.compile(r"\.wan22-[0-9a-f]{16}(\..*)?", re.DOTALL)


@contextmanager
def whole_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary name to write to; a complete file gets the name `path`, an incomplete one is removed.

    Args:
        path: the file; its folder is made if it is not there.
        replace: whether a file of this name is replaced; otherwise there is a FileExistsError.
    """
    with whole_series(replace) as temporary:
        yield temporary(path)


@contextmanager
def whole_series(replace: bool = True) -> Iterator[Callable[[Path], Path]]:
    """Yield what returns temporary names for files of one folder; they get their names when all are complete.

    See `whole_file`. The error of a full disk names the file.
    """
    parts: dict[Path, Path] = {}

    def temporary(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A short name, as path.name may be the longest that the system allows; nobody can guess it.
        parts[path] = path.parent / f".wan22-{secrets.token_hex(8)}{path.suffix.lower()}"
        # The mode is what the process's umask leaves.
        os.close(os.open(parts[path], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return parts[path]

    try:
        yield temporary
        _place(parts, replace)
    except OSError as error:
        names = {str(partial): path for path, partial in parts.items()}
        path = names.get(str(error.filename), list(parts)[-1] if parts else None)
        ours = str(error.filename) in names or (error.errno in NO_ROOM and error.filename is None)
        if path is None or not ours or error.errno is None:
            raise
        raise OSError(
            error.errno, f"{path} could not be written whole: {os.strerror(error.errno)}"
        ) from error
    finally:
        for partial in parts.values():
            partial.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Return whether a file has a name that `whole_file` gives to what is not complete, and a kill leaves."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _place(parts: Mapping[Path, Path], replace: bool) -> None:
    """Give complete files their names: all of them, or none."""
    added: list[Path] = []
    with _alone_in(next(iter(parts)).parent) if parts else nullcontext():
        try:
            for path, partial in parts.items():
                if replace:
                    partial.replace(path)
                else:
                    _add(partial, path)
                    added.append(path)
        except BaseException:
            for path in added:
                path.unlink(missing_ok=True)
            raise


def _add(partial: Path, path: Path) -> None:
    try:
        rename_exclusively(partial, path)
    except FileExistsError:
        advice = "save under another name; overwrite=True replaces it"
        raise FileExistsError(f"{path} exists: it appeared meanwhile; {advice}") from None


def rename_exclusively(source: Path, target: Path) -> None:
    """Give a file a name that is free; a FileExistsError says that it is not."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is taken by an empty file first
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        source.replace(target)
    else:
        source.unlink()


# ---- locks ----


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that name files in a folder, so that two series do not mix."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        yield
        return
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def lock(handle: int, wait: bool) -> bool | None:
    """Lock an open file or folder for as long as it is open; a process that is killed loses its locks.

    Returns: whether nobody else has it locked; None: this system or file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# ---- what a loss of power leaves ----


def sync_tree(folder: Path) -> None:
    """Let all files in a folder, and their names, be on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name), os.O_RDWR)
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Let the names in a folder be on the disk, where the system can."""
    _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    try:
        handle = os.open(path, flags)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    finally:
        os.close(handle)
