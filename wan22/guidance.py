"""Formulas of guidance for `guidance=`, as objects with their settings."""

from .pipelines.call.guidance.formulas import APG, TCFG, CFGZeroStar, MamboG
from .pipelines.call.guidance.guider import ClassifierFreeGuidance, Guider
from .pipelines.call.guidance.nag import NAG
from .pipelines.call.guidance.wrappers import Gated, Rescale, SkipLayer

__all__ = [
    "APG",
    "NAG",
    "TCFG",
    "CFGZeroStar",
    "ClassifierFreeGuidance",
    "Gated",
    "Guider",
    "MamboG",
    "Rescale",
    "SkipLayer",
]
