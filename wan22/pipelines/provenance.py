"""Where a pipeline's weights came from, and making a video again from its recipe."""

import logging
import platform
import weakref
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, schedulers
from ..checkpoints.files.fingerprint import fingerprint
from ..checkpoints.files.weights import weight_files
from ..checkpoints.lora.adapters import adapters_of, has_adapters
from ..video.metadata import read_recipe
from ..video.recipe import Origin, Recipe, UsedLora
from ..video.result import WanVideo

logger = logging.getLogger(__name__)

COMPONENTS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")
PACKAGES = ("torch", "diffusers", "transformers")
ASSETS = Path(__file__).parents[1].absolute() / "assets"


class ProvenancePipeline:
    """Knows the files behind its models, writes them into recipes, and makes a recipe's video again."""

    _place: str | None = None
    _files_of: Mapping[str, tuple[Any, Path]] = {}

    def came_from(self, place: Any, parts: Mapping[str, Path]) -> None:
        """Remember where the models were loaded from.

        Args:
            place: folder, repository or files, as the caller gave them.
            parts: file or folder of each component that was loaded.
        """
        folder = Path(str(place)).absolute()
        # The miniatures' folder is another one on every machine; their name is not.
        self._place = f"tiny-{folder.name}" if folder.parent == ASSETS else str(place)
        # By the model itself: one that is put in its place later is of other files.
        self._files_of = {
            name: (weakref.ref(getattr(self, name)), path)
            for name, path in parts.items()
            if name in COMPONENTS and getattr(self, name, None) is not None
        }

    def origin(self) -> Origin | None:
        """Return the files behind the models; None for a pipeline that was not loaded as a whole."""
        if self._place is None:
            return None
        files: dict[str, str] = {}
        replaced, revisions = [], set()
        for name in COMPONENTS:
            model = getattr(self, name, None)
            known, path = self._files_of.get(name, (lambda: None, Path()))
            if model is not None and known() is not model:
                replaced.append(name)
            elif model is not None:
                parts = path.parts
                if "snapshots" in parts[:-1]:
                    revisions.add(parts[parts.index("snapshots") + 1])
                files |= {f"{name}/{file.name}": fingerprint(file) for file in weight_files(path)}
        revision = revisions.pop() if len(revisions) == 1 else None
        return Origin(self._place, revision, files, tuple(replaced))

    def used_loras(self) -> tuple[UsedLora, ...]:
        """Return the LoRAs that are active."""
        found: dict[str, dict[str, tuple[str, float]]] = {}
        for slot in ("transformer", "transformer_2"):
            model = getattr(self, slot, None)
            if model is not None and has_adapters(model) and adapters_of(model).enabled:
                adapters = adapters_of(model)
                for name, strength in adapters.strengths.items():
                    if strength:
                        found.setdefault(name, {})[slot] = adapters.sources[name], strength
        return tuple(
            UsedLora(
                name,
                ", ".join(sorted({source for source, _ in slots.values()})) or None,
                {slot: strength for slot, (_, strength) in slots.items()},
                {slot: fingerprint(Path(s)) for slot, (s, _) in slots.items() if Path(s).is_file()},
            )
            for name, slots in found.items()
        )

    def circumstances(self) -> dict[str, Any]:
        """Return what a recipe tells of the pipeline beside the call's settings."""
        names = [name for name in COMPONENTS if getattr(self, name, None) is not None]
        scheduler = self.scheduler.config
        return {
            "pipeline": type(self).__name__,
            "scheduler_config": {k: v for k, v in scheduler.items() if not k.startswith("_")},
            "origin": self.origin(),
            "loras": self.used_loras(),
            "dtypes": {name: str(getattr(self, name).dtype).removeprefix("torch.") for name in names},
            "changes": self.changes(),
            "device": self.computed_on(),
            "versions": {"wan22": __version__, **{name: _version(name) for name in PACKAGES}},
        }

    def computed_on(self) -> str:
        """Return what computes, for recipes."""
        return device_name(self._execution_device)  # type: ignore[attr-defined]

    def changes(self) -> dict[str, Any]:
        """Return what moves results away from those of the plain models, by rounding or by more."""
        return {}

    def reproduce(self, source: str | Path | Recipe, **changes: Any) -> WanVideo:
        """Make a video again: on the same kind of machine the same frames, on a CPU to the bit.

        Args:
            source: file that `WanVideo.save` wrote, or a recipe.
            **changes: arguments of the call that replace the recipe's: another prompt or seed, say; `image`
                and `last_image` where the recipe's were in memory.

        Returns: the video.

        Raises:
            FileNotFoundError: there is no such file, or an image is not where it was.
            ValueError: the file carries no recipe, the recipe is of another checkpoint, other LoRAs or other
                settings of the pipeline than are loaded, or the video cannot be made again from it.
        """
        recipe = source if isinstance(source, Recipe) else read_recipe(source)
        self._check_recipe(recipe)
        arguments = _arguments(recipe, type(self).__name__) | changes
        if missing := [name for name in ("image", "last_image") if arguments.get(name) == [None]]:
            raise ValueError(f"the recipe's {missing[0]} was in memory; give {missing[0]}=")
        mine = self.scheduler  # type: ignore[has-type]
        try:
            self.scheduler = _scheduler_of(recipe, mine)
            return self(**arguments)  # type: ignore[operator]
        finally:
            self.scheduler = mine

    def _check_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe that this pipeline, as it stands, would make another video from."""
        if recipe.obstacle is not None:
            raise ValueError(f"the video cannot be made again from its recipe: {recipe.obstacle}")
        now = self.circumstances()
        if recipe.pipeline != now["pipeline"]:
            raise ValueError(f"the recipe is one of {recipe.pipeline}, this is a {now['pipeline']}")
        then, here = recipe.origin, now["origin"]
        if then is not None and here is not None:
            other = sorted(
                k for k in then.files.keys() | here.files if then.files.get(k) != here.files.get(k)
            )
            if other:
                raise ValueError(
                    f"the recipe is of {then.place}, this is {here.place}: {other[0]} is another file"
                )
        elif recipe.checkpoint != self.checkpoint_name:  # type: ignore[attr-defined]
            raise ValueError(f"the recipe is of {recipe.checkpoint}, this is {self.checkpoint_name}")  # type: ignore[attr-defined]
        if _loras(recipe.loras) != _loras(now["loras"]):
            wanted = ", ".join(f"{lora.source} at {dict(lora.strengths)}" for lora in recipe.loras)
            loaded = ", ".join(f"{lora.source} at {dict(lora.strengths)}" for lora in now["loras"])
            raise ValueError(f"the recipe has LoRAs: {wanted or 'none'}; loaded are: {loaded or 'none'}")
        for what in ("dtypes", "changes"):
            if (had := dict(getattr(recipe, what))) != now[what]:
                raise ValueError(f"the recipe was made with {what} {had}; this pipeline has {now[what]}")
        ratio = self.config.boundary_ratio  # type: ignore[attr-defined]
        if recipe.boundary_ratio != ratio:
            raise ValueError(f"the recipe's boundary_ratio is {recipe.boundary_ratio}, this one's {ratio}")
        moved = {what for what in ("device", "versions") if getattr(recipe, what) != now[what]}
        if moved:
            logger.warning("%s differ from the recipe's: results may differ by rounding", sorted(moved))


def device_name(device: torch.device) -> str:
    """Return what computes: a GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if device.type == "cpu" else str(device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _loras(used: tuple[UsedLora, ...]) -> list[Any]:
    """Return LoRAs in a form that does not depend on names and places."""
    return sorted((sorted(lora.files.items()), sorted(lora.strengths.items())) for lora in used)


def _scheduler_of(recipe: Recipe, mine: Any) -> Any:
    """Return the scheduler that a recipe names, with its settings."""
    config = {k: v for k, v in mine.config.items() if not k.startswith("_")}
    if recipe.few_steps is not None or (
        type(mine).__name__ == recipe.scheduler and _plain(config) == _plain(recipe.scheduler_config)
    ):
        return mine
    cls = (
        type(mine) if type(mine).__name__ == recipe.scheduler else getattr(schedulers, recipe.scheduler, None)
    )
    if cls is None:
        raise ValueError(f"the recipe's scheduler is {recipe.scheduler}; set pipe.scheduler to one first")
    return cls.from_config(dict(recipe.scheduler_config))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _arguments(recipe: Recipe, pipeline: str) -> dict[str, Any]:
    """Return the call that a recipe tells of."""
    arguments: dict[str, Any] = {
        "prompt": list(recipe.prompts),
        "negative_prompt": [text or "" for text in recipe.negative_prompts],
        "seed": list(recipe.seeds),
        "num_frames": recipe.num_frames,
        "guidance_scale": recipe.guidance_scale,
        "guidance_scale_2": recipe.guidance_scale_2,
        "max_sequence_length": recipe.max_sequence_length,
        "attention_kwargs": None if recipe.attention_kwargs is None else dict(recipe.attention_kwargs),
        "noise_device": recipe.noise_device,
        "recipe": recipe.few_steps,
    }
    if recipe.few_steps is None:
        arguments |= {"sigmas": recipe.sigmas, "timesteps": recipe.timesteps}
        if recipe.sigmas is None and recipe.timesteps is None:
            arguments |= {"num_inference_steps": recipe.num_inference_steps, "flow_shift": recipe.flow_shift}
    if recipe.max_area is None:
        arguments |= {"height": recipe.height, "width": recipe.width}
    if pipeline == "WanI2VPipeline":
        arguments |= {"max_area": recipe.max_area, "fit": recipe.fit}
        images = {"image": recipe.images, "last_image": recipe.last_images}
        arguments |= {name: list(values) for name, values in images.items() if values}
    return arguments
