"""Progress bars: of sampling, decoding and saving, and, in bytes, of reading and converting weights."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import TqdmWarning

from .notebooks import in_notebook

with warnings.catch_warnings():  # that ipywidgets, an extra, is not there: the bars are text then
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

# What moves the bar of bytes that is drawn at present.
_advance: ContextVar[Callable[[int], Any] | None] = ContextVar("advance", default=None)


def progress_bar(iterable: Any = None, total: int | None = None, **options: Any) -> Any:
    """Return tqdm's bar, drawn in terminals and notebooks only; the option `disable` decides otherwise."""
    # disable=None is tqdm's for: not if the output is a file, as in CI.
    notebook = in_notebook()
    defaults: dict[str, Any] = {"disable": False if notebook else None, "dynamic_ncols": not notebook}
    return tqdm(iterable, total=total, **defaults | options)


@contextmanager
def loading_bars(drawn: bool | None = None) -> Iterator[None]:
    """Let the bars that diffusers, transformers and the hub's library draw be `drawn`, or where ours are."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as of_transformers

    if drawn is None:
        drawn = in_notebook() or sys.stderr.isatty()
    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is False  # by the environment, which decides
    if drawn or asked_for:
        yield
        return
    hub_is_silent = are_progress_bars_disabled()
    drawing = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in drawing:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in drawing:
            library.enable_progress_bar()
        if hub_is_silent:  # transformers' switch moves the hub's as well
            disable_progress_bars()


@contextmanager
def bytes_bar(total: int, desc: str, **options: Any) -> Iterator[Any]:
    """Draw a bar of bytes and their speed, which `advance` moves; work of less than a second shows none.

    It is silent where the bars of huggingface_hub or diffusers are (HF_HUB_DISABLE_PROGRESS_BARS=1,
    `diffusers.utils.logging.disable_progress_bar`). `options` are tqdm's.
    """
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled

    quiet = are_progress_bars_disabled() or not of_diffusers.is_progress_bar_enabled()
    hidden = {"disable": True} if quiet or not total else {}
    units: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": 1}
    with progress_bar(total=total, desc=desc, **units | options | hidden) as bar:
        token = _advance.set(bar.update)
        try:
            yield bar
        finally:
            _advance.reset(token)


def advance(nbytes: int) -> None:
    """Count bytes that have been read and converted, or written; without a bar nothing happens."""
    if (update := _advance.get()) is not None:
        update(nbytes)
