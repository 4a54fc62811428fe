"""One word for how much faster a call is to be: the settings with the least known error for it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...checks import check_choice, shown
from .request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Settings, and what they cost on the miniature T2V: medians over 100 held-out prompts, 20 steps."""

    arguments: Mapping[str, Any]
    fewer: float  # times fewer passes of the transformer
    psnr: float  # to the exact video of the same seed, dB


# Of what tests/bench/quality.py measures, the best that any checkpoint can run: EasyCache needs no ratios.
FAST = {
    "low": Measured({"cache": "easy:low"}, 1.82, 36.9),
    "medium": Measured({"cache": "easy:medium"}, 2.22, 32.6),
    "high": Measured({"cache": "easy:high"}, 2.5, 28.3),
}


def with_fast(request: Request) -> Request:
    """Fill in the settings that `fast` picks, and say which they are.

    Raises: ValueError: there is no such word, or the call has settings of this sort already.
    """
    if request.fast is None:
        return request
    check_choice("fast", request.fast, FAST)
    for other in ("cache", "distilled"):
        if getattr(request, other) is not None:
            raise ValueError(f"fast={shown(request.fast)} picks a step cache; leave out it, or {other}")
    chosen = FAST[request.fast]
    logger.info(
        "fast=%s is %s: on the miniature %.3g times fewer passes, at a PSNR of %.0f dB to the exact video",
        *(shown(request.fast), _words(chosen.arguments), chosen.fewer, chosen.psnr),
    )
    return request.changed(**chosen.arguments, fast=None)


def _words(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
