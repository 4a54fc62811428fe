"""diffusers' caches of steps, as far as they suit a Wan transformer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers import FasterCacheConfig, TextKVCacheConfig
from diffusers.hooks import SeaCacheConfig
from torch import Tensor

from ...private_apis import attention_cache_hooks


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


@contextmanager
def attention_caches_of_pass(model: Any, name: str) -> Iterator[None]:
    """Let caches of attention keep what they skip by pass: with guidance, one would get the other's."""
    hooks, shared = attention_cache_hooks(model), []
    for hook in hooks:
        if not hasattr(hook.state, "of_pass"):
            # Counting from a multiple of the range, FasterCache computes at first, where it fails otherwise.
            hook.state = _states_by_pass(type(hook.state), hook.block_skip_range)
        shared.append(hook.state)
        hook.state = hook.state.of_pass(name)
    try:
        yield
    finally:
        for hook, state in zip(hooks, shared, strict=True):
            hook.state = state


def _states_by_pass(kind: type[Any], start: int) -> Any:
    """Return a cache's state that has one for each pass, counting from `start`, and resets them, too."""

    class StatesByPass(kind):
        by_pass: dict[str, Any]

        def of_pass(self, name: str) -> Any:
            if name not in self.by_pass:
                self.by_pass[name] = kind()
                self.by_pass[name].iteration = start
            return self.by_pass[name]

        def reset(self) -> None:
            super().reset()
            self.by_pass = {}

    state = StatesByPass()
    state.reset()
    return state


def _latents(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """Return the latents "c t h w" of a transformer's arguments."""
    return list(named["hidden_states"] if "hidden_states" in named else arguments[0])
