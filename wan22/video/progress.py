"""The progress bars: one form for sampling, decoding, saving, loading."""

from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Any = None, total: int | None = None, **options: Any) -> Any:
    """Return a bar that draws itself in terminals and notebooks, and is silent where nobody looks.

    Args:
        iterable: what to go through; None: the bar is moved by hand.
        total: how many there are.
        **options: tqdm's; `disable` decides whether it is drawn at all.
    """
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    # tqdm's None means: not where the output goes to a file, as in CI.
    defaults: dict[str, Any] = {"disable": False if in_notebook else None, "dynamic_ncols": not in_notebook}
    return tqdm(iterable, total=total, **defaults | options)
