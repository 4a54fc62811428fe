"""What a caller asks of a pipeline, and the plan that is made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .experts import Experts
from .output import Recipe

Prompt = str | Sequence[str] | None
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments that all pipelines' calls share; WanT2VPipeline.__call__ describes them."""

    prompt: Prompt
    negative_prompt: Prompt
    height: int | None
    width: int | None
    num_frames: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    num_videos_per_prompt: int
    generator: Generators
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable[..., Any] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int
    seed: int | Sequence[int] | None
    flow_shift: float | None
    sigmas: Sequence[float] | None
    timesteps: Sequence[float] | None
    noise_device: str | None


@dataclass(frozen=True)
class Plan:
    """A checked request, and all that its run needs.

    Args:
        request: as the caller gave it.
        recipe: every setting, completed.
        generators: one per video.
        scheduler: its schedule is set.
        experts: which transformer serves which timestep.
        guided: whether any step needs the negative prompt.
        callback_tensors: what the callback gets.
    """

    request: Request
    recipe: Recipe
    generators: list[torch.Generator]
    scheduler: Any
    experts: Experts
    guided: bool
    callback_tensors: Sequence[str]
