"""diffusers' caches of steps, as far as they suit a Wan transformer."""

from dataclasses import replace
from typing import Any

from diffusers import FasterCacheConfig, TextKVCacheConfig
from diffusers.hooks import SeaCacheConfig
from torch import Tensor


def adapted_cache(model: Any, config: Any) -> Any:
    """Return a cache's configuration for a Wan transformer, or refuse one that could not take effect."""
    if isinstance(config, TextKVCacheConfig):
        raise ValueError(
            "TextKVCacheConfig keeps projections that Wan transformers do not have, here or in diffusers; "
            "leave it out"
        )
    if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
        if model.config.in_channels != model.config.out_channels:
            raise ValueError(
                "SeaCacheConfig tells latents from given frames only for text to video; give "
                "raw_vision_callback, which returns a list of latents 'c t h w'"
            )
        return replace(config, raw_vision_callback=_latents)
    return config


def check_cache_for_passes(config: Any) -> None:
    """Refuse a cache that needs the passes of guidance in one batch; here they run one after the other."""
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise ValueError(
            "FasterCacheConfig splits a batch of both passes of guidance, which run one after the other "
            "here; is_guidance_distilled=True skips attention alone"
        )


def _latents(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """Return the latents "c t h w" of a transformer's arguments."""
    return list(named["hidden_states"] if "hidden_states" in named else arguments[0])
