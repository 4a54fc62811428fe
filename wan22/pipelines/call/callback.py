"""The caller's function after each step, which may replace latents and embeddings.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l text tokens, d their width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback

from ...checks import check_choice
from .checks import check_embeds, check_latents
from .denoiser import TextEmbeds
from .experts import Step
from .text import pad_tokens


class StepCallback:
    """Calls a function as f(pipe, step, timestep, tensors) and applies what it returns.

    `tensors` are the names it asks for, among `allowed`; a callback of diffusers names its tensors itself.
    """

    def __init__(self, function: Callable[..., Any], tensors: Sequence[str], allowed: Sequence[str]) -> None:
        if isinstance(function, PipelineCallback | MultiPipelineCallbacks):
            tensors = function.tensor_inputs
            if any(isinstance(callback, IPAdapterScaleCutoffCallback) for callback in _all_of(function)):
                raise ValueError("IPAdapterScaleCutoffCallback is for an IP adapter, and Wan has none")
        for name in tensors:
            check_choice("callback_on_step_end_tensor_inputs", name, allowed)
        self.function, self.tensors = function, tuple(tensors)

    def __call__(self, pipe: Any, step: Step, latents: torch.Tensor, embeds: TextEmbeds) -> torch.Tensor:
        """Return the latents "b c t h w" to go on with; embeddings "b l d" are replaced in place."""
        offered = {"latents": latents, **embeds}
        replaced = self.function(pipe, step.index, step.timestep, {n: offered[n] for n in self.tensors}) or {}
        positive = embeds["prompt_embeds"]
        assert positive is not None, "a call always has prompt embeddings"
        width = positive.shape[2]
        for name in embeds.keys() & replaced.keys():
            value = replaced[name]
            if value is None and name == "negative_prompt_embeds":
                embeds[name] = None  # the rest of the run is not guided
            elif value is not embeds[name]:
                check_embeds(name, value, width, len(latents))
                embeds[name] = pad_tokens(value)
        if "latents" not in replaced:  # looking at them would make the host wait for the step
            return latents
        check_latents(replaced["latents"], tuple(latents.shape))
        return replaced["latents"].to(latents)


def _all_of(callback: Any) -> list[Any]:
    """Return the callbacks that one of diffusers' consists of."""
    if not isinstance(callback, MultiPipelineCallbacks):
        return [callback]
    return [each for part in callback.callbacks for each in _all_of(part)]
