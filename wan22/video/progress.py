"""Progress bars for sampling, decoding, saving and loading."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Any = None, total: int | None = None, **options: Any) -> Any:
    """Return tqdm's bar, drawn in terminals and notebooks only; the option `disable` decides otherwise."""
    # disable=None is tqdm's for: not if the output is a file, as in CI.
    notebook = in_notebook()
    defaults: dict[str, Any] = {"disable": False if notebook else None, "dynamic_ncols": not notebook}
    return tqdm(iterable, total=total, **defaults | options)


def in_notebook() -> bool:
    """Return whether this code runs in a notebook's kernel, not in a script or IPython's terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None
