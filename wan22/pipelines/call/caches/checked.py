"""Refuses step caches that would not suit a call, and completes those that do, before any work."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ....checkpoints.loading.models import is_ours
from ....checks import shown
from ..experts import Step
from ..request import Request
from ..schedule import scheduler_shift
from .calibration import Calibration
from .published import known_ratios
from .settings import WARMUP, WARMUP_OF_TWO, MagCache, StepCache, cache_of

logger = logging.getLogger(__name__)

# Fewer steps differ so much from one another that an estimate costs quality, and there is little to skip.
LEAST_STEPS = 8


def checked_cache(pipe: Any, request: Request) -> StepCache | None:
    """Return the step cache of a call, completed by what is known of the checkpoint.

    Raises: ValueError: it cannot go together with the models or the other arguments.
    """
    cache = cache_of(request.cache)
    if cache is None:
        return None
    if request.distilled is not None:
        raise ValueError("cache= and distilled=: each of so few steps counts; leave one of them out")
    for model in pipe.transformers:
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                "cache= and a step cache of diffusers in the model would skip at once; call disable_cache()"
            )
        if cache.residuals and not is_ours(model):
            raise ValueError(
                f"cache={shown(cache.method)} skips the blocks of wan22's transformers, and this "
                f"{type(model).__name__} is not one; cache='easy' suits any, or load it with "
                "wan22.WanTransformer3DModel"
            )
    if cache.is_per_expert and pipe.config.boundary_ratio is None:
        raise ValueError(f"{cache}: pairs are for checkpoints of two experts; give one value")
    if cache.method == Calibration.method:
        return cache
    cache = _with_ratios(cache, pipe, request) if isinstance(cache, MagCache) else cache
    return _with_warmup(cache, pipe.config.boundary_ratio is not None)


def _with_ratios(cache: MagCache, pipe: Any, request: Request) -> MagCache:
    """Return settings with ratios: the given ones, or those that are known."""
    ratios = cache.ratios
    if ratios is None:
        name = pipe.released.name if pipe.released is not None else ""
        ratios = known_ratios(name, request.arguments.get("image") is not None)
    if ratios is None:
        raise ValueError(
            f"cache='mag' needs ratios, and there are none for {pipe.checkpoint_name}; "
            "pipe.calibrate_cache(prompts) measures them, and cache= takes what it returns"
        )
    return replace(cache, ratios=ratios)


def _with_warmup(cache: StepCache, two: bool) -> StepCache:
    """Return settings with a warm-up: the given one, the checkpoint's published one, or the default."""
    if cache.warmup is not None:
        return cache
    published = cache.ratios.warmup if isinstance(cache, MagCache) and cache.ratios is not None else {}
    if not two:
        return replace(cache, warmup=published.get("transformer", WARMUP))
    high, low = WARMUP_OF_TWO
    return replace(cache, warmup=(published.get("transformer", high), published.get("transformer_2", low)))


def check_schedule(cache: StepCache | None, request: Request, scheduler: Any, steps: Sequence[Step]) -> None:
    """Refuse a schedule or a solver that a step cache does not suit; warn of ratios that are another's.

    Raises: ValueError: there are fewer than 8 steps, or the solver runs the model twice a step or adds noise.
    """
    if cache is None or cache.method == Calibration.method:
        return
    name = type(scheduler).__name__
    if len(steps) < LEAST_STEPS:
        raise ValueError(
            f"cache= is for schedules of at least {LEAST_STEPS} steps, this one has {len(steps)}; "
            "leave cache out"
        )
    if (scheduler.num_inference_steps or len(steps)) < len(steps):
        raise ValueError(f"cache= is for solvers that run the model once a step, and {name} does so twice")
    if adds_noise(scheduler):
        raise ValueError(
            f"cache= is for solvers that add no noise, which what is kept would not know of; {name} does"
        )
    if isinstance(cache, MagCache):
        given = request.sigmas is not None or request.timesteps is not None
        shift = request.flow_shift if request.flow_shift is not None else scheduler_shift(scheduler)
        _warn_of_shift(cache, None if given else shift)


def adds_noise(scheduler: Any) -> bool:
    """Whether a solver, ours or diffusers', draws noise at each step."""
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde"):
        return True
    return any(part in name for part in ("LCM", "SASolver", "Ancestral", "SDE"))


def _warn_of_shift(cache: MagCache, shift: float | None) -> None:
    assert cache.ratios is not None, "they are completed"
    measured = cache.ratios.shift
    if measured == shift and shift is not None:
        return
    ours, theirs = (f"shift {s:g}" if s is not None else "a given schedule" for s in (shift, measured))
    logger.warning(
        "cache='mag': its ratios were measured with %s, this call has %s and may skip too much or too "
        "little; pipe.calibrate_cache(prompts) with this call's arguments measures its own",
        *(theirs, ours),
    )
