"""The progress bars: one form for sampling, decoding, saving, loading."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Any = None, total: int | None = None, **options: Any) -> Any:
    """Return a bar that draws itself in terminals and notebooks, and is silent where nobody looks.

    Args:
        iterable: what to go through; None: the bar is moved by hand.
        total: how many there are.
        **options: tqdm's; `disable` decides whether it is drawn at all.
    """
    # tqdm's None means: not where the output goes to a file, as in CI.
    notebook = in_notebook()
    defaults: dict[str, Any] = {"disable": False if notebook else None, "dynamic_ncols": not notebook}
    return tqdm(iterable, total=total, **defaults | options)


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel, not in a script or IPython's terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None
