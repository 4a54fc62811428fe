"""diffusers' caches of steps, as far as they suit a Wan transformer."""

from collections.abc import Callable, Iterator
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
    # Counting from a multiple of the range, FasterCache computes at first, where it fails otherwise.
    with _separate_states(model, name, lambda hook: hook.block_skip_range):
        yield


@contextmanager
def attention_caches_of_video(model: Any, video: int) -> Iterator[None]:
    """Let caches in a model of diffusers keep what they skip by video, for both passes of it, as there.

    diffusers computes all videos in one batch; here each goes through the model by itself, and would get
    another's attention.
    """
    if video == 0:
        yield
    else:
        with _separate_states(model, f"video {video}", lambda _: 0):
            yield


@contextmanager
def _separate_states(model: Any, name: str, start: Callable[[Any], int]) -> Iterator[None]:
    """Let the hooks of attention caches have states of their own under a name, counting from `start`."""
    hooks, shared = attention_cache_hooks(model), []
    for hook in hooks:
        if not hasattr(hook.state, "named"):
            hook.state = _with_named_states(hook.state)
        shared.append(hook.state)
        hook.state = hook.state.named(name, start(hook))
    try:
        yield
    finally:
        for hook, state in zip(hooks, shared, strict=True):
            hook.state = state


def _with_named_states(state: Any) -> Any:
    """Return a cache's state as it is, which also holds others by name, and resets them, too."""
    kind: Any = type(state)

    class NamedStates(kind):
        states: dict[str, Any]

        def named(self, name: str, start: int) -> Any:
            if name not in self.states:
                self.states[name] = kind()
                self.states[name].iteration = start
            return self.states[name]

        def reset(self) -> None:
            super().reset()
            self.states = {}

    holder = NamedStates()
    holder.__dict__.update(vars(state), states={})
    return holder


def _latents(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """Return the latents "c t h w" of a transformer's arguments."""
    return list(named["hidden_states"] if "hidden_states" in named else arguments[0])
