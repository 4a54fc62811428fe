"""The command line: `wan22 t2v`, `wan22 i2v`, `wan22 batch`, `wan22 info` and others; see `wan22 --help`."""

from typing import Any


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those it was called with.
    """
    from .app import app

    app(arguments, prog_name="wan22")
