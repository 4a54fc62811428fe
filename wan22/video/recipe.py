"""Every setting of one call, as plain values: what a video needs to be made again.

In memory a recipe has the places of files as they were given, so that the same process makes its video again.
What leaves the process, `to_dict` and `to_json`, has no folders of this machine: names and fingerprints.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..checks import cut, shown
from ..notebooks import table
from ..presets import PRESETS
from .privacy import without_folders
from .schema import check_recipe, parsed

logger = logging.getLogger(__name__)

FORMAT = 2
_KEY = "wan22_recipe"
# Arguments of a call with a value per prompt, per image or per video.
PER_PROMPT = ("prompt", "negative_prompt", "seed", "image", "last_image")
# Those of them that name files or URLs.
IMAGES = ("image", "last_image")


@dataclass(frozen=True)
class Origin:
    """Where a pipeline's weights came from."""

    place: str  # folder, repository or files, as they were given
    revision: str | None = None  # commit of a repository's snapshot
    files: Mapping[str, str] = field(default_factory=dict)  # fingerprints by component and file name
    replaced: tuple[str, ...] = ()  # components given ready made or replaced since, whose files are unknown
    shared: str | None = field(default=None, compare=False, repr=False)  # the place, without folders


@dataclass(frozen=True)
class UsedLora:
    """An active LoRA."""

    name: str
    source: str | None  # file, folder or repository; None for tensors in memory
    strengths: Mapping[str, float]  # factor of its weights in each transformer
    files: Mapping[str, str] = field(default_factory=dict)  # fingerprints by transformer
    shared: str | None = field(default=None, compare=False, repr=False)  # the source, without folders


@dataclass(frozen=True)
class Recipe:
    """Every setting of one call. The call's arguments are attributes, too: `recipe.guidance_scale`.

    Args:
        checkpoint: the preset's name, or the source of the weights.
        pipeline, scheduler: class names.
        call: the call's arguments as plain values, completed with the checkpoint's settings:
            `pipe(**recipe.call)` makes the video again. Images are paths or URLs, None for one in memory.
        pictures: fingerprints of the call's images, by argument, in their order; of the decoded pixels, not
            of the bytes, for the same picture in another file, or in memory, makes the same video.
        width, height: pixels.
        boundary_ratio: share of 1000 at which the experts switch; None for one transformer.
        dtypes: dtype of each component.
        changes: what else moves the result, by rounding or by more, with its settings: attention kernel,
            quantisation, tiling, …
        memory: memory of the device that plans had to fit into, "auto" for what was free; None without plans.
        versions: versions of the packages.
        steps_done: steps after which the run was stopped; None: it went to its end.
        passes: with a step cache, for each video the passes that were computed, and of how many.
        sizes: with a resolution schedule, width, height and number of steps of each of its parts.
        not_reproducible_because: why the call alone does not give the video again; None if it does.
        outside: whether it was read, and anybody may have written it; what it names is not opened unasked.
    """

    checkpoint: str
    pipeline: str
    call: Mapping[str, Any]
    width: int
    height: int
    num_frames: int
    fps: int
    scheduler: str
    num_inference_steps: int
    boundary_ratio: float | None = None
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origin: Origin | None = None
    loras: tuple[UsedLora, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    memory: str | None = field(default=None, compare=False)
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    steps_done: int | None = None
    passes: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int, int], ...] = ()
    not_reproducible_because: str | None = None
    outside: bool = field(default=False, compare=False, repr=False)

    def __hash__(self) -> int:
        """Hash what tells most recipes apart; their tables have no hash."""
        sizes = self.width, self.height, self.num_frames, self.num_inference_steps
        return hash((self.checkpoint, self.pipeline, *sizes, self.seeds, self.prompts))

    def __getattr__(self, name: str) -> Any:
        if name != "call" and name in self.call:  # "call" itself is missing while a copy is unpickled
            return self.call[name]
        raise AttributeError(f"a recipe has no {shown(name)}, and neither has its call")

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of each video; None where its noise was given."""
        return tuple(self.call["seed"])

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """The prompt of each video; None where embeddings were given."""
        repeat, prompts = self.call["num_videos_per_prompt"], self.call["prompt"]
        return tuple(prompt for prompt in prompts for _ in range(repeat))

    def __str__(self) -> str:
        call = self.call
        scale = call["guidance_scale"]
        scales = f"{scale:g}" if not isinstance(scale, Sequence) else f"{min(scale):g} to {max(scale):g}"
        if call.get("guidance_scale_2") is not None and self.boundary_ratio is not None:
            scales += f"/{call['guidance_scale_2']:g} (high/low noise, boundary {self.boundary_ratio:g})"
        guidance = call.get("guidance")
        formula = "" if guidance is None else f"{cut(guidance['name'])} "
        shift = call.get("flow_shift")
        size = f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps"
        parts = f" ({sizes_in_words(self.sizes)})" if self.sizes else ""
        return (
            f"{self.checkpoint}: {len(self.seeds)} x {size}, {self.num_inference_steps} steps{parts} of "
            f"{self.scheduler}, {'custom schedule' if shift is None else f'shift {shift:g}'}, "
            f"{formula}guidance {scales}, seeds {cut(', '.join(map(str, self.seeds)))}"
        )

    def _repr_html_(self) -> str:
        """Return what the recipe says of the video, for notebooks."""
        told = {name: value for name, value in self.call.items() if value not in (None, [], ())}
        if isinstance(cache := told.get("cache"), Mapping):  # whose ratios are a number for each step
            told["cache"] = {name: value for name, value in cache.items() if name != "ratios"}
        passes = cut(", ".join(f"{computed} of {of}" for computed, of in self.passes))
        rows = {
            **{name: as_words(value) for name, value in told.items()},
            "scheduler": f"{self.scheduler}, {self.num_inference_steps} steps",
            "sizes": cut(sizes_in_words(self.sizes)),
            "passes computed": passes,
            "LoRAs": ", ".join(f"{lora.name} {as_words(lora.strengths)}" for lora in self.loras),
            "dtypes": as_words(self.dtypes),
            "changes": as_words(self.changes),
            "device": self.device,
            "versions": as_words(self.versions),
            "not reproducible": self.not_reproducible_because or "",
        }
        size = f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps"
        return table(f"{self.checkpoint}: {size}", [(name, text) for name, text in rows.items() if text])

    def of(self, index: int) -> "Recipe":
        """Return the recipe of one of the videos alone."""
        videos = len(self.seeds)
        own = {
            name: [values[index * len(values) // videos]]
            for name in PER_PROMPT
            if isinstance(values := self.call.get(name), Sequence) and not isinstance(values, str) and values
        }
        marks = {name: (m[index * len(m) // videos],) for name, m in self.pictures.items() if m}
        passes = self.passes[index : index + 1]
        call = {**self.call, **own, "num_videos_per_prompt": 1}
        return replace(self, call=call, pictures=marks, passes=passes)

    def without_prompts(self) -> "Recipe":
        """Return a recipe without its prompts, and the negative ones that are not a checkpoint's own."""
        own = {preset.negative_prompt for preset in PRESETS}
        negative = self.call.get("negative_prompt")
        if negative is not None:
            negative = [text if text in own else None for text in negative]
        texts = {"prompt": [None] * len(self.call["prompt"]), "negative_prompt": negative}
        return replace(self, call={**self.call, **texts})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, files by their names alone."""
        values = asdict(self)
        del values["outside"]
        values["checkpoint"] = without_folders(self.checkpoint)
        for name in IMAGES:
            if isinstance(images := self.call.get(name), Sequence) and not isinstance(images, str):
                values["call"][name] = [i if i is None else without_folders(str(i)) for i in images]
        for entry, name in ((values["origin"], "place"), *((lora, "source") for lora in values["loras"])):
            if entry is not None and (shared := _shared(entry.pop("shared"), entry[name])) is not None:
                entry[name] = shared
        return values

    def to_json(self) -> str:
        """Return the settings as one line of ASCII, for a file's metadata."""
        return json.dumps({_KEY: FORMAT, **self.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read what `to_json` wrote, in this version or an earlier one.

        Raises: ValueError: it is something else, or an entry is not of its kind.
        """
        try:
            values = parsed(text)
            version = values.pop(_KEY, None)
            if not isinstance(version, int) or version < 1:
                raise ValueError(
                    f"{_KEY}={shown(version)} must be the number of the format, such as {FORMAT}"
                )
            values = _upgraded(values) if version == 1 else values
            check_recipe(values)
        except ValueError as error:
            raise ValueError(f"this is no recipe of wan22: {cut(error)}") from error
        if version > FORMAT:
            logger.info("the recipe was written by a newer wan22; what is new in it is left out")
        known = {f.name for f in fields(cls)} - {"outside"}
        values = {name: value for name, value in values.items() if name in known}
        if (origin := values.get("origin")) is not None:
            values["origin"] = Origin(**_known(Origin, frozen(origin)))
        values["loras"] = tuple(UsedLora(**_known(UsedLora, lora)) for lora in values.get("loras", ()))
        for name in ("scheduler_config", "changes", "pictures"):
            values[name] = frozen(values.get(name, {}))
        for name in ("passes", "sizes"):
            values[name] = frozen(values.get(name, ()))
        return cls(**values, outside=True)


def stopped_after(step: int, recipe: Recipe) -> Recipe:
    """Return the recipe of a call that was stopped after a step, counted from 1."""
    return replace(recipe, steps_done=step, not_reproducible_because=f"it was stopped after step {step}")


def sizes_in_words(sizes: Sequence[tuple[int, int, int]]) -> str:
    """Return what a recipe's sizes say: "10 at 48x48, 10 at 64x64"."""
    return ", ".join(f"{steps} at {width}x{height}" for width, height, steps in sizes)


def with_passes(recipe: Recipe, passes: Mapping[int, tuple[int, int]]) -> Recipe:
    """Return a recipe with each video's passes, computed and all, if a step cache has counted them."""
    return replace(recipe, passes=tuple(passes[video] for video in sorted(passes))) if passes else recipe


def _shared(given: str | None, places: str | None) -> str | None:
    """Return what may be said of one or several places: what whoever knew them one by one says, if so."""
    if given is not None or places is None:
        return given
    return ", ".join(map(without_folders, places.split(", ")))


def as_words(value: Any) -> str:
    """Return a setting for people: without brackets and quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_words(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(as_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a table's entries that are fields of a class."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def _upgraded(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe of format 1, which held the settings of each video, in the present format."""
    negative = old.get("negative_prompts")
    call: dict[str, Any] = {
        "prompt": old.get("prompts"),
        "negative_prompt": [t or "" for t in negative] if isinstance(negative, list) else negative,
        "seed": old.get("seeds"),
        "num_videos_per_prompt": 1,
        "distilled": old.get("few_steps"),
        "image": old.get("images") or None,
        "last_image": old.get("last_images") or None,
    }
    names = ["num_frames", "guidance_scale", "guidance_scale_2", "max_sequence_length", "noise_device"]
    names += ["attention_kwargs", "max_area", "fit", "sigmas"]
    if old.get("max_area") is None:
        names += ["height", "width"]
    if old.get("few_steps") is None:
        custom = old.get("sigmas") is not None or old.get("timesteps") is not None
        names += ["timesteps"] if custom else ["num_inference_steps", "flow_shift"]
    call |= {name: old.get(name) for name in names}
    call = {name: value for name, value in call.items() if value is not None}
    return {**old, "call": call, "not_reproducible_because": old.get("obstacle")}


def frozen(value: Any) -> Any:
    """Turn JSON's lists into tuples, also within others."""
    if isinstance(value, Mapping):
        return {name: frozen(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(frozen(inner) for inner in value)
    return value
