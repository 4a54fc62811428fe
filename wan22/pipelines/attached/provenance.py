"""Where a pipeline's weights came from, and whether a recipe's video can be made with them."""

import inspect
import logging
import platform
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ... import __version__, schedulers
from ...accel.planning.meta_models import MODELS
from ...checkpoints.files.fingerprint import fingerprint
from ...checkpoints.files.weights import weight_files
from ...checkpoints.lora.adapters import adapters_of
from ...checks import as_number, cut, shown
from ...devices import name_of
from ...host_memory import FileMappings
from ...video.privacy import without_folders
from ...video.recipe import Origin, Recipe, UsedLora, frozen
from ..call.images import Picture
from ..call.request import plain
from .differences import differences, different_pictures, warn_of_the_rest
from .part import Part

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers")
ASSETS = Path(__file__).parents[2].absolute() / "assets"


@dataclass(frozen=True)
class Loaded:
    """A model's files as they were when it was loaded; they may be replaced or deleted since."""

    model: "weakref.ref[Any]"
    revision: str | None  # commit of a repository's snapshot
    fingerprints: Mapping[str, str]  # by file name
    sizes: Mapping[Path, int]

    @classmethod
    def of(cls, model: Any, path: Path) -> "Loaded":
        """Look at a model's file, or at those in its folder."""
        files, parts = weight_files(path), path.parts
        revision = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
        fingerprints = {file.name: fingerprint(file) for file in files}
        # By the model itself: one that replaces it later has other files.
        return cls(weakref.ref(model), revision, fingerprints, {f.resolve(): f.stat().st_size for f in files})

    def check(self) -> None:
        """Raise OSError if a file that weights are read from was cut off: reading on ends the process."""
        for path, size in self.sizes.items():
            try:
                shrunk = path.stat().st_size < size
            except OSError:  # deleted: what is mapped stays as it is
                continue
            if shrunk:
                for file in FileMappings().files:
                    if file.path == str(path):
                        file.check()


class Provenance(Part):
    """Knows the files behind a pipeline's models, and holds recipes against the pipeline as it stands."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._places: tuple[str, ...] = ()
        self._loaded: Mapping[str, Loaded] = {}

    def record_source(self, places: Sequence[str], parts: Mapping[str, Path]) -> None:
        """Remember the models' sources as the caller gave them, and the file or folder of each component."""
        folders = {place: Path(place).absolute() for place in places}
        # The miniatures' folder differs from machine to machine; their name does not.
        names = (f"tiny-{path.name}" if path.parent == ASSETS else place for place, path in folders.items())
        self._places = tuple(names)
        self._loaded = {
            name: Loaded.of(getattr(self._pipe, name), path)
            for name, path in parts.items()
            if name in MODELS and getattr(self._pipe, name, None) is not None
        }

    def copy_from(self, other: "Provenance") -> None:
        """Take over what another pipeline knows of the models that both share."""
        self._places, self._loaded = other._places, other._loaded

    def check_files(self) -> None:
        """Raise OSError if weights are read from a file that was cut off since they were loaded."""
        for loaded in self._loaded.values():
            loaded.check()

    def origin(self) -> Origin | None:
        """Return the files behind the models; None for a pipeline that was not loaded as a whole."""
        if not self._places:
            return None
        files: dict[str, str] = {}
        replaced: list[str] = []
        revisions: set[str | None] = set()
        for name in MODELS:
            model = getattr(self._pipe, name, None)
            loaded = self._loaded.get(name)
            if model is not None and (loaded is None or loaded.model() is not model):
                replaced.append(name)
            elif model is not None and loaded is not None:
                revisions.add(loaded.revision)
                files |= {f"{name}/{file}": mark for file, mark in loaded.fingerprints.items()}
        revisions.discard(None)
        revision = revisions.pop() if len(revisions) == 1 else None
        place, shared = ", ".join(self._places), ", ".join(map(without_folders, self._places))
        return Origin(place, revision, files, tuple(replaced), shared)

    def used_loras(self) -> tuple[UsedLora, ...]:
        """Return the LoRAs that change the result: active or fused, unloaded since or not."""
        found: dict[str, dict[str, tuple[str, Any]]] = {}
        marks: dict[str, dict[str, str]] = {}
        for slot in ("transformer", "transformer_2"):
            if (model := getattr(self._pipe, slot)) is not None:
                adapters = adapters_of(model)
                for name, (source, strength) in adapters.used().items():
                    found.setdefault(name, {})[slot] = source or "", strength
                for name, mark in adapters.fingerprints().items():
                    marks.setdefault(name, {})[slot] = mark
        loras = []
        for name, slots in found.items():
            strengths = {slot: strength for slot, (_, strength) in slots.items()}
            sources = sorted({source for source, _ in slots.values() if source})
            shared = ", ".join(map(without_folders, sources)) or None
            loras.append(UsedLora(name, ", ".join(sources) or None, strengths, marks.get(name, {}), shared))
        return tuple(loras)

    def device_description(self) -> str:
        """Return the name of the device, and of the ranks that share the work."""
        pipe = self._pipe
        device = device_name(pipe._execution_device)
        return device if pipe.parallel is None else f"{device}, {pipe.parallel}"

    def run_metadata(self) -> dict[str, Any]:
        """Return a recipe's entries about the pipeline, beside the call's settings."""
        pipe = self._pipe
        names = [name for name in MODELS if getattr(pipe, name, None) is not None]
        return {
            "checkpoint": pipe.checkpoint_name,
            "pipeline": type(pipe).__name__,
            "boundary_ratio": as_number(pipe.config.boundary_ratio),
            "scheduler_config": scheduler_settings(pipe.scheduler),
            "origin": self.origin(),
            "loras": self.used_loras(),
            "dtypes": {name: str(getattr(pipe, name).dtype).removeprefix("torch.") for name in names},
            "changes": pipe.acceleration.changes(),
            "memory": pipe.memory.budget,
            "device": self.device_description(),
            "versions": {"wan22": __version__, **{name: _version(name) for name in PACKAGES}},
        }

    def check(self, recipe: Recipe, anyway: bool = False) -> None:
        """Refuse, with the reasons, a recipe that the pipeline as it stands would make another video from.

        `anyway`: warn of them in place of refusing.
        """
        now = self.run_metadata()
        if recipe.pipeline != now["pipeline"]:
            theirs = cut(recipe.pipeline)
            raise ValueError(f"the recipe is one of {theirs}, this is a {now['pipeline']}")
        refuse(differences(recipe, now), anyway)
        warn_of_the_rest(recipe, now)

    def check_pictures(
        self, recipe: Recipe, pictures: Mapping[str, Sequence[Picture]], anyway: bool = False
    ) -> None:
        """Refuse other pictures than a recipe's, given in their place; `anyway`: warn of them."""
        refuse(different_pictures(recipe, pictures), anyway)


def refuse(found: Iterable[str], anyway: bool) -> None:
    """Raise a ValueError for what is found, or log it."""
    if (reasons := list(found)) and not anyway:
        raise ValueError(f"{'; '.join(reasons)}; anyway=True makes a video all the same, which is another")
    for reason in reasons:
        logger.warning("%s; the video is another", reason)


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the CPU's architecture."""
    return platform.machine() if device.type == "cpu" else name_of(device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def scheduler_of(recipe: Recipe, mine: Any) -> Any:
    """Return the scheduler that a recipe names, ours or diffusers', with its settings."""
    if recipe.call.get("distilled") is not None or (
        type(mine).__name__ == recipe.scheduler and scheduler_settings(mine) == recipe.scheduler_config
    ):
        return mine
    name = recipe.scheduler
    known: list[Any] = [type(mine)] if type(mine).__name__ == name else []
    known += [
        getattr(place, name, None) for place in (schedulers, diffusers.schedulers) if name in dir(place)
    ]
    cls: Any = next((cls for cls in known if isinstance(cls, type) and issubclass(cls, SchedulerMixin)), None)
    if cls is None or cls is schedulers.FlowMatchScheduler:
        raise ValueError(f"the recipe's scheduler is {shown(name)}; set pipe.scheduler to one first")
    # Without what the config has kept of other classes, and diffusers would warn of.
    parameters, config = inspect.signature(cls).parameters, dict(recipe.scheduler_config)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        config = {n: v for n, v in config.items() if n in parameters}
    try:
        return cls.from_config(config)
    except (
        Exception
    ) as error:  # schedulers of diffusers raise whatever a setting of a wrong type leads them to
        reason = f"{type(error).__name__}: {cut(error)}"
        raise ValueError(f"the recipe's {shown(name)} cannot be built from its config: {reason}") from error


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's settings as a recipe holds them."""
    return frozen(plain({n: v for n, v in scheduler.config.items() if not n.startswith("_")}))
