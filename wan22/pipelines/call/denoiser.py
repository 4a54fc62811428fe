"""From noisy latents to the velocity of a step.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l text tokens, d their width.
"""

from collections.abc import Callable, Mapping
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
# Given the text tokens of passes, "b l d" by their names, it returns what each predicts, "b c t h w".
Predict = Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]
RunPasses = Callable[[Mapping[str, torch.Tensor], Predict], list[torch.Tensor]]


class Denoiser(Protocol):
    """Predicts the velocity of a step. What changes or skips predictions wraps another denoiser."""

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the velocity of noisy latents, both "b c t h w" float32."""
        ...


class CFGDenoiser:
    """Runs the transformer with and without the prompt, and combines both predictions.

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
        positive, negative = self.embeds["prompt_embeds"], self.embeds["negative_prompt_embeds"]
        assert positive is not None, "a call always has prompt embeddings"
        passes = {"cond": positive}
        wanted = self.state.do_classifier_free_guidance and self.guidance.needs_negative(step)
        if negative is not None and wanted:
            passes["uncond"] = negative
        predicted = self._run_passes(passes, partial(self._predict, latents, step))
        if "uncond" not in passes:
            return predicted[0]
        videos = zip(predicted[0].split(1), predicted[1].split(1), strict=True)
        return torch.cat([self.guidance.combine(cond, uncond, step) for cond, uncond in videos])

    def _predict(
        self, latents: torch.Tensor, step: Step, passes: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run passes: video by video, or together if the model takes their samples in turn."""
        model: Any = step.expert.model
        videos = latents.split(1)

        def inputs(video: int) -> dict[str, Any]:
            return self.condition.model_inputs(video, videos[video], step.timestep.reshape(1))

        first, *others = passes.values()
        # A callback may have given other embeddings.
        alike = len(first) == len(videos) and all(embeds.shape == first.shape for embeds in others)
        if not alike or not takes_samples_in_turn(model):
            return [
                torch.cat([self._run(name, embeds, i, inputs(i), step) for i in range(len(videos))])
                for name, embeds in passes.items()
            ]
        each = list(map(inputs, range(len(videos))))
        batch = {name: torch.cat([given[name] for given in each] * len(passes)) for name in each[0]}
        text = torch.cat(list(passes.values())).to(model.dtype)
        return list(self._call(model, batch, text).chunk(len(passes)))

    def _run(
        self, name: str, embeds: torch.Tensor, video: int, inputs: dict[str, Any], step: Step
    ) -> torch.Tensor:
        """Run one pass of a video. diffusers' step caches keep what they skip by pass and video."""
        model: Any = step.expert.model
        text = embeds[video : video + 1].to(model.dtype)
        video_caches: AbstractContextManager[None] = nullcontext()
        if not is_ours(model):
            inputs, video_caches = _for_diffusers(model, inputs), attention_caches_of_video(model, video)
        state = {"step_index": step.index, "sigma": step.sigma, "num_inference_steps": step.count}
        with video_caches, model.cache_context(name + (f"-{video}" if video else ""), **state):
            return self._call(model, inputs, text)

    def _call(self, model: Any, inputs: dict[str, Any], text: torch.Tensor) -> torch.Tensor:
        kwargs = {"attention_kwargs": self.state.attention_kwargs, "return_dict": False}
        return model(encoder_hidden_states=text, **kwargs, **inputs)[0].float()


def takes_samples_in_turn(model: Any) -> bool:
    """Whether a batch's samples go through a model's blocks in turn, each as in a call of its own.

    Step caches and the attention of others may depend on the order of calls.
    """
    if not is_ours(model) or not model.samples_in_turn or model.is_cache_enabled:
        return False
    return all(layer.attends_in_parts for block in model.blocks for layer in (block.attn1, block.attn2))


def _for_diffusers(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as diffusers' model takes them: latents in its dtype, times for each token."""
    latents, timestep = inputs["hidden_states"], inputs["timestep"]
    if timestep.ndim == 2:
        _, rows, columns = model.config.patch_size
        timestep = timestep.repeat_interleave(latents[0, 0, 0, ::rows, ::columns].numel(), dim=1)
    return inputs | {"hidden_states": latents.to(model.dtype), "timestep": timestep}
