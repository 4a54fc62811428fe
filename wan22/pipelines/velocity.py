"""One step's velocity: classifier-free guidance.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, d width of a text token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .experts import Expert

Embeds = dict[str, torch.Tensor | None]
Pass = Callable[[], torch.Tensor]


def one_by_one(passes: Sequence[Pass]) -> list[torch.Tensor]:
    """Run the passes of a step, with and without the prompt, and return what each predicts."""
    return [run() for run in passes]


class Velocity:
    """Predicts velocities with classifier-free guidance.

    Args:
        run: runs a step's passes, one or two, and returns what each predicts.
    """

    def __init__(self, run: Callable[[Sequence[Pass]], list[torch.Tensor]] = one_by_one) -> None:
        self._run = run

    def guided(
        self,
        expert: Expert,
        inputs: dict[str, Any],
        embeds: Embeds,
        step: dict[str, Any],
        video: int = 0,
    ) -> torch.Tensor:
        """Predict one video's velocity with classifier-free guidance, in float32.

        Args:
            expert: the transformer and its guidance scale.
            inputs: the transformer's arguments beside the text.
            embeds: of all videos, "b 512 d": "prompt_embeds", and "negative_prompt_embeds"; if that is None,
                the step is not guided.
            step: what diffusers' step caches want to know about the step.
            video: its place in the batch; each video has step caches of its own.

        Returns: "1 c t h w".
        """
        positive, negative = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
        assert positive is not None, "a call always has prompt embeddings"
        passes = [partial(self._predict, expert, inputs, "cond", positive, step, video)]
        if expert.guidance_scale == 1 or negative is None:
            return self._run(passes)[0]
        passes.append(partial(self._predict, expert, inputs, "uncond", negative, step, video))
        conditional, unconditional = self._run(passes)
        return unconditional + expert.guidance_scale * (conditional - unconditional)

    def _predict(
        self,
        expert: Expert,
        inputs: dict[str, Any],
        name: str,
        embeds: torch.Tensor,
        step: dict[str, Any],
        video: int,
    ) -> torch.Tensor:
        text = embeds[video : video + 1].to(expert.model.dtype)
        with expert.model.cache_context(name + (f"-{video}" if video else ""), **step):
            return expert.model(encoder_hidden_states=text, return_dict=False, **inputs)[0].float()
