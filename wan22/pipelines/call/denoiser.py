"""From noisy latents to the velocity of a step.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l text tokens, d their width.
"""

from typing import Any, Protocol

import torch

from .experts import Step
from .guidance.guider import Memory, PassSettings
from .guidance.scales import Guidance, LastBoth
from .passes import Pass, Predictor
from .state import CallState

TextEmbeds = dict[str, torch.Tensor | None]


class Denoiser(Protocol):
    """Predicts the velocity of a step. What changes it, as windows or masks do, wraps another denoiser."""

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the velocity of noisy latents, both "b c t h w" float32."""
        ...


class GuidedDenoiser:
    """Combines the predictions of a step's passes, video by video.

    Args:
        predict: runs the passes of a step.
        embeds: "prompt_embeds" and "negative_prompt_embeds", each "b l d"; no step is guided if the latter
            is None. A callback may replace them between steps.
        guidance: the formula, and its scale at each step.
        state: the call's; a callback may switch guidance off in it.
    """

    def __init__(self, predict: Predictor, embeds: TextEmbeds, guidance: Guidance, state: CallState) -> None:
        self.predict, self.embeds, self.guidance, self.state = predict, embeds, guidance, state
        self._last = LastBoth()
        self._stage: Any = None  # whose predictions the memories are of
        self._memories: list[Memory] = []

    def __call__(self, latents: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the guided velocity of noisy latents, both "b c t h w" float32."""
        if step.stage != self._stage:  # whose predictions are of other statistics, or another shape
            self._stage, self._memories = step.stage, [{} for _ in latents]
        guider, scale = self.guidance.guider, self.guidance.scale_at(step)
        if self._negative is None:
            scale = 1
        needed = guider.passes(step, scale, self._last.since(step))
        self._last.note(step, needed)
        if not needed:
            return torch.zeros_like(latents)
        passes = {name: self._pass(settings) for name, settings in needed.items()}
        predicted = self.predict(latents, step, passes, range(len(latents)))
        videos = zip(*(predicted[name].split(1) for name in passes), strict=True)
        each = [dict(zip(passes, video, strict=True)) for video in videos]
        velocities = [guider.combine(e, scale, step, m) for e, m in zip(each, self._memories, strict=True)]
        return velocities[0] if len(velocities) == 1 else torch.cat(velocities)

    @property
    def _negative(self) -> torch.Tensor | None:
        """The negative prompt's tokens, unless there are none, or guidance is off."""
        return self.embeds["negative_prompt_embeds"] if self.state.do_classifier_free_guidance else None

    def _pass(self, settings: PassSettings) -> Pass:
        positive, negative = self.embeds["prompt_embeds"], self._negative
        assert positive is not None, "a call always has prompt embeddings"
        if settings.negative:
            assert negative is not None, "without a negative prompt no pass needs it"
            return Pass(negative, settings.skip_layers)
        if settings.attention is None or negative is None:
            return Pass(positive, settings.skip_layers)
        return Pass(positive, settings.skip_layers, negative, settings.attention)
