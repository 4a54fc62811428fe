"""From noisy latents to the velocity of a step.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l text tokens, d their width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from ...checkpoints.loading.diffusers_caches import attention_caches_of_video
from ...checkpoints.loading.models import is_ours
from .conditions import Condition
from .experts import Step
from .guidance import Guidance
from .state import CallState

TextEmbeds = dict[str, torch.Tensor | None]
Pass = Callable[[], torch.Tensor]
RunPasses = Callable[[Sequence[Pass]], list[torch.Tensor]]


class Denoiser(Protocol):
    """Predicts the velocity of a step. What changes or skips predictions wraps another denoiser."""

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the velocity of noisy latents, both "b c t h w" float32."""
        ...


class CFGDenoiser:
    """Runs the transformer with and without the prompt, video by video, and combines both predictions.

    Each video goes through the model by itself: to the last bit it does not depend on its neighbours in the
    batch, and one video's tokens fill a device.

    Args:
        embeds: "prompt_embeds" and "negative_prompt_embeds", each "b l d"; no step is guided if the latter
            is None. A callback may replace them between steps.
        state: the call's; a callback may switch guidance off in it.
        run_passes: runs the passes of a step, one or two, and returns what each predicts.
    """

    def __init__(
        self,
        condition: Condition,
        embeds: TextEmbeds,
        guidance: Guidance,
        state: CallState,
        run_passes: RunPasses,
    ) -> None:
        self.condition, self.embeds, self.guidance = condition, embeds, guidance
        self.state, self._run_passes = state, run_passes

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the guided velocity of noisy latents, both "b c t h w" float32."""
        return torch.cat([self._guided(video, z, step) for video, z in enumerate(latents.split(1))])

    def _guided(self, video: int, latents: torch.Tensor, step: Step) -> torch.Tensor:
        inputs = self.condition.model_inputs(video, latents, step.timestep.reshape(1))
        positive, negative = self.embeds["prompt_embeds"], self.embeds["negative_prompt_embeds"]
        assert positive is not None, "a call always has prompt embeddings"
        passes = [partial(self._predict, "cond", video, positive, inputs, step)]
        wanted = self.state.do_classifier_free_guidance and self.guidance.needs_negative(step)
        if negative is None or not wanted:
            return self._run_passes(passes)[0]
        passes.append(partial(self._predict, "uncond", video, negative, inputs, step))
        conditional, unconditional = self._run_passes(passes)
        return self.guidance.combine(conditional, unconditional, step)

    def _predict(
        self, name: str, video: int, embeds: torch.Tensor, inputs: dict[str, Any], step: Step
    ) -> torch.Tensor:
        """Run one pass. diffusers' step caches keep what they skip by pass and video."""
        model: Any = step.expert.model
        text = embeds[video : video + 1].to(model.dtype)
        video_caches: AbstractContextManager[None] = nullcontext()
        if not is_ours(model):
            inputs, video_caches = _for_diffusers(model, inputs), attention_caches_of_video(model, video)
        state = {"step_index": step.index, "sigma": step.sigma, "num_inference_steps": step.count}
        with video_caches, model.cache_context(name + (f"-{video}" if video else ""), **state):
            return model(
                encoder_hidden_states=text,
                attention_kwargs=self.state.attention_kwargs,
                return_dict=False,
                **inputs,
            )[0].float()


def _for_diffusers(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as diffusers' model takes them: latents in its dtype, times for each token."""
    latents, timestep = inputs["hidden_states"], inputs["timestep"]
    if timestep.ndim == 2:
        _, rows, columns = model.config.patch_size
        timestep = timestep.repeat_interleave(latents[0, 0, 0, ::rows, ::columns].numel(), dim=1)
    return inputs | {"hidden_states": latents.to(model.dtype), "timestep": timestep}
