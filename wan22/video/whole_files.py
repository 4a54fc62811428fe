"""Files that are written whole or not at all, and take no other file's place unasked."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        if error.errno not in _NO_ROOM or error.filename is not None or not parts:
            raise
        path = list(parts)[-1]
        raise OSError(
            error.errno, f"{path} could not be written whole: {os.strerror(error.errno)}"
        ) from error
    finally:
        for partial in parts.values():
            partial.unlink(missing_ok=True)


def _place(parts: Mapping[Path, Path], replace: bool) -> None:
    """Give complete files their names: all of them, or none."""
    added: list[Path] = []
    with _alone_in(next(iter(parts)).parent) if parts else nullcontext():
        try:
            for path, partial in parts.items():
                if replace:
                    partial.replace(path)
                else:
                    _rename_exclusively(partial, path)
                    added.append(path)
        except BaseException:
            for path in added:
                path.unlink(missing_ok=True)
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that name files in a folder, so that two series do not mix."""
    handle = None
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _rename_exclusively(source: Path, target: Path) -> None:
    """Give a file a name that is free; a FileExistsError says that it is not, though it was before."""
    try:
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: the name is taken by an empty file first
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            source.replace(target)
    except FileExistsError:
        advice = "save under another name; overwrite=True replaces it"
        raise FileExistsError(f"{target} exists: it appeared meanwhile; {advice}") from None
