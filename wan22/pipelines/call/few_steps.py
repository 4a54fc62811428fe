"""Calls with the settings of distilled models: schedule, guidance, and LoRAs' strengths by step."""

import logging
from collections.abc import Mapping
from typing import Any

from ...checkpoints.loading.models import is_ours
from ...checkpoints.lora.adapters import adapters_of
from ...checks import check_choice, check_real, shown
from ...few_steps import FEW, FewSteps, distilled_adapters, looks_distilled, read_few_steps
from ...video.recipe import Recipe
from .experts import Expert, LoraScales
from .request import Request

logger = logging.getLogger(__name__)


def with_distilled(request: Request) -> Request:
    """Fill in the schedule and the guidance of the `distilled` settings that are asked for."""
    if request.distilled is None:
        return request
    settings = read_few_steps(request.distilled)
    for other in ("num_inference_steps", "flow_shift", "sigmas", "timesteps"):
        if getattr(request, other) is not None:
            name = shown(request.distilled) if isinstance(request.distilled, str) else "…"
            raise ValueError(f"distilled={name} has its own timesteps; leave {other} out")
    scales = settings.guidance_scales
    scale: Any = scales if len(set(scales)) > 1 else scales[0]
    return request.changed(
        distilled=settings,
        timesteps=settings.timesteps,
        sigmas=settings.sigmas,
        guidance_scale=scale if request.guidance_scale is None else request.guidance_scale,
    )


def scales_loras(request: Request) -> bool:
    """Whether a call gives LoRAs other strengths than those they were loaded with."""
    if request.distilled is not None and read_few_steps(request.distilled).changes_strengths:
        return True
    return bool(request.attention_kwargs) and request.attention_kwargs.get("scale") is not None


def lora_scales(pipe: Any, settings: FewSteps | None) -> LoraScales | None:
    """Return what gives the factors of LoRAs' strengths at each step; None if they do not change.

    Args:
        pipe: the pipeline.
        settings: those of the distilled model; None: it is none.

    Raises: ValueError: the LoRA whose strength changes is not loaded, nothing tells which it is, or it is
        fused into the weights.
    """
    if settings is None or not settings.changes_strengths:
        return None

    def factors(expert: Expert, timestep: float) -> Mapping[str, float]:
        asked = settings.phase_of(timestep).lora
        if asked == 1:
            return {}
        if not is_ours(expert.model):
            raise ValueError(
                f"distilled= changes LoRAs' strengths; pipe.{expert.slot} must be a transformer of wan22"
            )
        loaded = adapters_of(expert.model)
        if not isinstance(asked, Mapping):
            sources = {adapter: source for adapter, (source, _) in loaded.used().items()}
            asked = dict.fromkeys(distilled_adapters(sources), asked)
        for adapter in asked:
            if adapter not in loaded.names:
                known = ", ".join(loaded.names) or "none"
                raise ValueError(
                    f"distilled= names the adapter {shown(adapter)}; pipe.{expert.slot} has {known}"
                )
            if adapter in loaded.in_weights:
                raise ValueError(
                    f"distilled= changes the strength of {shown(adapter)}, which is fused into the "
                    "weights; call unfuse_lora() first"
                )
        return {**dict.fromkeys(loaded.names, 1.0), **asked}

    return factors


def with_scales(given: Mapping[str, Any] | None, factors: Mapping[str, float] | None) -> Any:
    """Return a call's attention_kwargs with the factors of a step; as they are if there are none."""
    if not factors:
        return given
    scale = (given or {}).get("scale", 1.0)
    called = scale if isinstance(scale, Mapping) else dict.fromkeys(factors, scale)
    return {**(given or {}), "scale": {name: called.get(name, 1.0) * factors[name] for name in factors}}


def check_scale(pipe: Any, attention_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse factors of LoRAs' strengths that are no numbers, or of adapters that are not there."""
    scale = (attention_kwargs or {}).get("scale")
    if not isinstance(scale, Mapping):
        if scale is not None:
            check_real("attention_kwargs['scale']", scale)
        return
    known = {name for model in pipe.transformers for name in adapters_of(model).names}
    for name, factor in scale.items():
        check_choice("an adapter in attention_kwargs['scale']", name, sorted(known))
        check_real(f"attention_kwargs['scale'][{shown(name)}]", factor)


def hint_at_settings(recipe: Recipe) -> None:
    """Say that weights look distilled where a call takes many steps, which makes worse videos of them."""
    if recipe.call["distilled"] is not None or recipe.num_inference_steps <= FEW:
        return
    sources = [] if recipe.origin is None else [recipe.origin.place]
    sources += [f"{lora.source or ''} {lora.name}".strip() for lora in recipe.loras]
    for source in sources:
        if (name := looks_distilled(source)) is not None:
            logger.warning(
                "%s looks distilled to a few steps, and this call takes %d; distilled=%s has its settings",
                *(shown(source), recipe.num_inference_steps, shown(name)),
            )
            return
