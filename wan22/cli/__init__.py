"""The command line: `wan22 t2v`, `wan22 i2v`, `wan22 batch`, `wan22 info` and others; see `wan22 --help`."""

from typing import Any


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line with arguments; by default, those that the program was started with."""
    from .app import app
    from .reporting import accept_any_text

    accept_any_text()
    app(arguments, prog_name="wan22")
