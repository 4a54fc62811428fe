"""Weight files: read, fill models with them, convert them."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .converting.convert import convert

    return convert
