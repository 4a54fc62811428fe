"""Files that are written whole or not at all, and take no other file's place unasked."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, replace: bool = True, added: list[Path] | None = None) -> Iterator[Path]:
    """Yield a temporary name to write to; a complete file gets the name `path`, an incomplete one is removed.

    Args:
        path: the file; its folder is made if it is not there.
        replace: whether a file of this name is replaced; otherwise there is a FileExistsError.
        added: the name is appended if it was free before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A short name, as path.name may be the longest that the system allows.
    partial = path.parent / f".wan22-{secrets.token_hex(8)}{path.suffix.lower()}"
    # The mode is what the process's umask leaves.
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        is_new = not path.exists()
        if replace:
            partial.replace(path)
        else:
            _rename_exclusively(partial, path)
        if added is not None and is_new:
            added.append(path)
    finally:
        partial.unlink(missing_ok=True)


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
