"""From noisy latents to the velocity of a step.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l text tokens, d their width.
"""

from typing import Protocol

import torch

from .experts import Step
from .guidance import Guidance
from .passes import Pass, Predictor
from .state import CallState

TextEmbeds = dict[str, torch.Tensor | None]


class Denoiser(Protocol):
    """Predicts the velocity of a step. What changes it, as windows or masks do, wraps another denoiser."""

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the velocity of noisy latents, both "b c t h w" float32."""
        ...


class GuidedDenoiser:
    """Combines the predictions with and without the prompt, video by video.

    Args:
        predict: runs the passes of a step.
        embeds: "prompt_embeds" and "negative_prompt_embeds", each "b l d"; no step is guided if the latter
            is None. A callback may replace them between steps.
        guidance: the formula.
        state: the call's; a callback may switch guidance off in it.
    """

    def __init__(self, predict: Predictor, embeds: TextEmbeds, guidance: Guidance, state: CallState) -> None:
        self.predict, self.embeds, self.guidance, self.state = predict, embeds, guidance, state

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the guided velocity of noisy latents, both "b c t h w" float32."""
        positive, negative = self.embeds["prompt_embeds"], self.embeds["negative_prompt_embeds"]
        assert positive is not None, "a call always has prompt embeddings"
        passes = {"cond": Pass(positive)}
        wanted = self.state.do_classifier_free_guidance and self.guidance.needs_negative(step)
        if negative is not None and wanted:
            passes["uncond"] = Pass(negative)
        predicted = self.predict(latents, step, passes, range(len(latents)))
        if "uncond" not in passes:
            return predicted["cond"]
        videos = zip(predicted["cond"].split(1), predicted["uncond"].split(1), strict=True)
        return torch.cat([self.guidance.combine(cond, uncond, step) for cond, uncond in videos])
