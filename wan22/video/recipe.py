"""Every setting of one call, as plain values: what a video needs to be made again."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

logger = logging.getLogger(__name__)

FORMAT = 1
_KEY = "wan22_recipe"


@dataclass(frozen=True)
class Origin:
    """Where a pipeline's weights came from.

    Args:
        place: the folder, repository or files, as they were given.
        revision: the repository's commit; None for what is no repository's snapshot.
        files: a fingerprint of each weight file, by the component and its name.
        replaced: components that were given ready made, or replaced since: their files are not known.
    """

    place: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class UsedLora:
    """A LoRA that took part.

    Args:
        name: of the adapter.
        source: the file, folder or repository; None for tensors that were in memory.
        strengths: what its changes were multiplied by, by transformer.
        files: a fingerprint of each of its files, by name.
    """

    name: str
    source: str | None
    strengths: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Every setting of one call.

    Args:
        checkpoint: the preset's name, or where the weights came from.
        prompts: one per video.
        negative_prompts: one per video; None where embeddings were given or guidance was off.
        seeds: one per video; None where the caller gave latents.
        height: pixels.
        width: pixels.
        num_frames: frames.
        fps: frames per second.
        scheduler: class name.
        num_inference_steps: denoising steps.
        flow_shift: of the noise schedule; None where timesteps or sigmas were given.
        guidance_scale: of the high-noise expert, or the only transformer.
        guidance_scale_2: of the low-noise expert.
        boundary_ratio: where the experts switch; None for one transformer.
        images: first frames, one or one per prompt, by path or URL; None for one that was in memory.
        last_images: last frames, likewise.
        fit: how the images were brought to the size; None: the official way.
        max_area: pixels that height times width could have; None where the size did not follow the images.
        pipeline: the class that was called.
        timesteps: that were given.
        sigmas: that were given.
        few_steps: the recipe that was asked for by its name.
        max_sequence_length: tokens at which prompts were cut.
        attention_kwargs: that were given.
        noise_device: where the noise was drawn.
        scheduler_config: the scheduler's settings.
        origin: where the weights came from.
        loras: that took part.
        dtypes: of the components.
        changes: what else moves the result, by rounding or by more: attention kernel, quantisation, tiling, …
        device: that computed.
        versions: of the packages.
        steps_done: steps after which the run was stopped; None: it went to its end.
        obstacle: why the video cannot be made again from this alone; None if it can.
    """

    checkpoint: str
    prompts: tuple[str | None, ...]
    negative_prompts: tuple[str | None, ...]
    seeds: tuple[int | None, ...]
    height: int
    width: int
    num_frames: int
    fps: int
    scheduler: str
    num_inference_steps: int
    flow_shift: float | None
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    images: tuple[str | None, ...] = ()
    last_images: tuple[str | None, ...] = ()
    fit: str | None = None
    max_area: int | None = None
    pipeline: str = ""
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    few_steps: str | None = None
    max_sequence_length: int = 512
    attention_kwargs: Mapping[str, Any] | None = None
    noise_device: str | None = None
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    loras: tuple[UsedLora, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    steps_done: int | None = None
    obstacle: str | None = None

    def __str__(self) -> str:
        scales = f"{self.guidance_scale:g}"
        if self.guidance_scale_2 is not None:
            scales += f"/{self.guidance_scale_2:g} (high/low noise, boundary {self.boundary_ratio:g})"
        shift = "custom schedule" if self.flow_shift is None else f"shift {self.flow_shift:g}"
        size = f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps"
        return (
            f"{self.checkpoint}: {len(self.prompts)} x {size}, {self.num_inference_steps} steps of "
            f"{self.scheduler}, {shift}, guidance {scales}, seeds {', '.join(map(str, self.seeds))}"
        )

    def of(self, index: int) -> "Recipe":
        """Return the recipe of one of the videos alone."""

        def one(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return values and (values[index * len(values) // len(self.prompts)],)

        return replace(
            self,
            prompts=one(self.prompts),
            negative_prompts=one(self.negative_prompts),
            seeds=one(self.seeds),
            images=one(self.images),
            last_images=one(self.last_images),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the settings as one line of ASCII, for a file's metadata."""
        return json.dumps({_KEY: FORMAT, **self.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(text)
            if values.pop(_KEY) > FORMAT:
                logger.info("the recipe was written by a newer wan22; what is new in it is left out")
            known = {f.name for f in fields(cls)}
            values = {name: _frozen(value) for name, value in values.items() if name in known}
            if values.get("origin") is not None:
                values["origin"] = Origin(**values["origin"])
            values["loras"] = tuple(UsedLora(**lora) for lora in values.get("loras", ()))
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("this is no recipe of wan22") from error


def _frozen(value: Any) -> Any:
    """Turn JSON's lists into tuples, also within others."""
    if isinstance(value, Mapping):
        return {name: _frozen(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(inner) for inner in value)
    return value
