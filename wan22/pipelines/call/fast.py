"""One word for how much faster a call is to be: the settings with the least known error for it."""

import logging
from typing import Any

from ...checks import check_choice, shown
from .caches.settings import EasyCache, StepCache
from .request import Request

logger = logging.getLogger(__name__)

# EasyCache needs nothing of a checkpoint, keeps little, and of all caches its worst videos are the best ones.
# On the miniatures, times fewer passes of the transformer and PSNR to the exact video of the same seed:
# medians of 100 held-out prompts by tests/bench/quality.py; TI2V's of text to video, its lower ones.
MEASURED = {
    "tiny-t2v": {"low": (1.82, 38.6), "medium": (2.22, 34.9), "high": (2.5, 30.6)},
    "tiny-i2v": {"low": (2.22, 40.5), "medium": (2.5, 36.3), "high": (3.33, 28.3)},
    "tiny-ti2v": {"low": (1.67, 36.5), "medium": (2.0, 32.3), "high": (2.5, 28.0)},
}
# Elsewhere the thresholds are its authors': arXiv 2507.02860, for Wan 2.1.
PUBLISHED = {"low": 0.05, "medium": 0.1, "high": 0.2}


def with_fast(pipe: Any, request: Request) -> Request:
    """Fill in the cache that `fast` picks for a pipeline's checkpoint, and say which it is.

    Raises: ValueError: there is no such word, or the call has settings of this sort already.
    """
    word = request.fast
    if word is None:
        return request
    check_choice("fast", word, PUBLISHED)
    for other in ("cache", "distilled"):
        if getattr(request, other) is not None:
            raise ValueError(f"fast={shown(word)} picks a step cache; leave out it, or {other}")
    released = pipe.released
    if released is not None and released.name in MEASURED:
        cache: StepCache = EasyCache.preset(word)
        fewer, psnr = MEASURED[released.name][word]
        told = f"{fewer:g} times fewer passes, at a PSNR of {psnr:.0f} dB to the exact video"
    else:
        cache = EasyCache(PUBLISHED[word])
        told = "its authors' setting; what it costs with this checkpoint was not measured"
    logger.info("fast=%s is %s: %s", shown(word), cache, told)
    return request.changed(cache=cache, fast=None)
