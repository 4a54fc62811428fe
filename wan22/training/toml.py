"""TOML files, read."""

import sys
from pathlib import Path
from typing import Any

from ..checks import as_path, cut

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_toml(file: str | Path) -> dict[str, Any]:
    """Return what is in a TOML file; a ValueError names the file and the line of what is none."""
    path = as_path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{cut(file)} is not TOML: it is not text in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{cut(file)} is not TOML: {cut(error)}") from error
