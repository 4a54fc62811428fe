"""The predictor of each step cache."""

from typing import Any

from ..passes import ModelPredictor, Predictor
from .calibration import Calibration, MeasuringPredictor
from .easy import EasyPredictor
from .mag import MagPredictor
from .settings import EasyCache, MagCache, StepCache, TaylorCache
from .taylor import TaylorPredictor

_PREDICTORS: dict[type[StepCache], Any] = {
    EasyCache: EasyPredictor,
    MagCache: MagPredictor,
    TaylorCache: TaylorPredictor,
    Calibration: MeasuringPredictor,
}


def wrapped(inner: ModelPredictor, call: Any, ranks: Any) -> Predictor:
    """Return a predictor that skips what a call's step cache allows; without one, what is given."""
    return inner if call.cache is None else _PREDICTORS[type(call.cache)](inner, call.cache, call, ranks)
