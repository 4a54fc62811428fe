"""One step's velocity: classifier-free guidance over calls that share what they have in common.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, s text rows, d their width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from ..models.reuse import PromptCache, TransformerCache
from .experts import Expert

Embeds = dict[str, torch.Tensor | None]
Pass = Callable[[], torch.Tensor]


def one_by_one(passes: Sequence[Pass]) -> list[torch.Tensor]:
    """Run the passes of a step, with and without the prompt, and return what each predicts."""
    return [run() for run in passes]


@dataclass(frozen=True)
class _Prompt:
    """What is known of one video's prompt.

    Args:
        embeds: of all videos, "b 512 d", that it was taken from.
        row: of this one, "1 512 d".
        image: the image encoder's rows that the transformer gets as well.
        arguments: the transformer's about it.
    """

    embeds: torch.Tensor
    row: torch.Tensor
    image: torch.Tensor | None
    arguments: dict[str, Any]


class Velocity:
    """Predicts velocities in one run, computing once what the run's calls have in common.

    Of one transformer at a time, it keeps each prompt's keys and values in the cross-attentions, once for all
    videos of it, the rotary tables and the step's modulation. Once weights may have changed, `forget` them.

    Args:
        keep: whether to keep anything; the result is the same.
        merge: whether one text row may stand for many on the CPU; False where every number of rows would be
            compiled for.
        run: runs a step's passes, one or two, and returns what each predicts.
    """

    def __init__(
        self,
        keep: bool = True,
        merge: bool = True,
        run: Callable[[Sequence[Pass]], list[torch.Tensor]] = one_by_one,
    ) -> None:
        self.keep, self.merge, self._run = keep, merge, run
        self._expert: Expert | None = None
        self._shared = TransformerCache()
        self._prompts: dict[tuple[str, int], _Prompt] = {}

    def forget(self) -> None:
        """Drop what is kept: weights, or what they are multiplied by, may have changed."""
        self._expert, self._shared, self._prompts = None, TransformerCache(), {}

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
        if expert != self._expert:
            self.forget()
            self._expert = expert
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
        prompt = self._prompts.get((name, video))
        if prompt is None or prompt.embeds is not embeds:
            image, row = inputs.get("encoder_hidden_states_image"), embeds[video : video + 1]
            twins = (p for (n, _), p in self._prompts.items() if n == name and p.embeds is embeds)
            twin = next((p for p in twins if _equal(p.row, row) and _equal(p.image, image)), None)
            arguments = self._prepare(expert, row) if twin is None else twin.arguments
            prompt = self._prompts[name, video] = _Prompt(embeds, row, image, arguments)
        with expert.model.cache_context(name + (f"-{video}" if video else ""), **step):
            return expert.model(return_dict=False, **prompt.arguments, **inputs)[0].float()

    def _prepare(self, expert: Expert, embeds: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments about one prompt "1 512 d"."""
        rows, bias = embeds.to(expert.model.dtype), None
        # Elsewhere a bias would rule out the fast attention kernels.
        if self.merge and embeds.device.type == "cpu":
            rows, bias = merge_zero_rows(rows)
        arguments: dict[str, Any] = {"encoder_hidden_states": rows, "encoder_attention_bias": bias}
        # A transformer compiled as a whole would be compiled once more for a filled cache.
        if self.keep and not isinstance(expert.model, OptimizedModule):
            arguments["cache"] = PromptCache(self._shared)
        return arguments


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def merge_zero_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let one row stand for all the zero ones at a prompt's end.

    They are identical, so that attention to c of them is attention to one whose logits are log(c) higher:
    the same result up to rounding.

    Args:
        rows: of one prompt, "1 s d".

    Returns: "1 r d" with r up to s; and "1 r" to add to the logits, or None if there is nothing to merge.
    """
    filled = rows[0].any(dim=-1).nonzero()
    kept = int(filled[-1]) + 1 if len(filled) else 0
    count = rows.shape[1] - kept
    if count < 2:
        return rows, None
    bias = rows.new_zeros(1, kept + 1, dtype=torch.float32)
    bias[:, kept] = math.log(count)
    return rows[:, : kept + 1], bias
