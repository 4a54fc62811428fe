"""What a notebook shows of an object: a small table, its text escaped."""

import html
import sys
from collections.abc import Iterable

from .checks import cut

_STYLE = "text-align: left; vertical-align: top"


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return HTML with a title, and a row for each name and its text, whose lines stay lines."""
    lines = [
        f'<tr><th style="{_STYLE}; font-weight: normal; opacity: 0.7">{_escaped(name)}</th>'
        f'<td style="{_STYLE}">{"<br>".join(map(_escaped, text.splitlines()))}</td></tr>'
        for name, text in rows
    ]
    return f"<div><b>{_escaped(title)}</b><table>{''.join(lines)}</table></div>"


def in_notebook() -> bool:
    """Return whether this code runs in a notebook's kernel, not in a script or IPython's terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def _escaped(text: str) -> str:
    return html.escape(cut(text))
