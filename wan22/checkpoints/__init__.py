"""Weight files: read, fill models with them, convert them.

Imports run one way: files (containers), naming (names and configurations), loading (models), then lora and
converting.
"""

from typing import Any

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .converting.convert import convert

    return convert
