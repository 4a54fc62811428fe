"""What a caller asks of a pipeline, and the plan that is made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..video.recipe import Recipe
from ..video.result import OutputType
from .experts import Experts
from .images import Fit, Picture

if TYPE_CHECKING:
    from typing_extensions import Self

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
    output_type: OutputType
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
    recipe: str | None
    preview: Any
    preview_every: int | None
    preview_decoder: Any

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "Self":
        """Take the fields out of a call's arguments."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def prompt_count(self) -> int | None:
        """How many prompts there must be, if something else of the request says so."""
        return None

    def recorded(self) -> dict[str, Any]:
        """Return what the recipe tells beside the settings that all calls have."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ImageRequest(Request):
    """The arguments of an image-to-video call, its images read; WanI2VPipeline.__call__ describes them."""

    image: Sequence[Picture]
    last_image: Sequence[Picture]
    image_embeds: torch.Tensor | None
    max_area: int | None
    fit: Fit | None

    @property
    def prompt_count(self) -> int | None:
        """How many prompts there must be: as many as images, if there are several."""
        images = max(len(self.image), len(self.last_image))
        return images if images > 1 else None

    def recorded(self) -> dict[str, Any]:
        """Return the images' names and how they were fitted."""
        return {
            "images": tuple(picture.name for picture in self.image),
            "last_images": tuple(picture.name for picture in self.last_image),
            "fit": self.fit,
        }


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
