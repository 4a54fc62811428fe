"""Where a pipeline's weights came from, and whether a recipe's video can be made with them."""

import inspect
import logging
import platform
import weakref
from collections.abc import Mapping
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
from ...checkpoints.lora.sources import lora_fingerprint
from ...checks import as_number, cut, printable, shown
from ...video.recipe import Origin, Recipe, UsedLora, frozen
from ..call.request import plain
from .part import Part

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers")
ASSETS = Path(__file__).parents[2].absolute() / "assets"


class Provenance(Part):
    """Knows the files behind a pipeline's models, and holds recipes against the pipeline as it stands."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._place: str | None = None
        # The model, its file or folder, and the state of each file when it was loaded.
        self._files_of: Mapping[str, tuple[Any, Path, dict[Path, tuple[int, ...]]]] = {}

    def record_source(self, place: Any, parts: Mapping[str, Path]) -> None:
        """Remember the models' source as the caller gave it, and the file or folder of each component."""
        folder = Path(str(place)).absolute()
        # The miniatures' folder differs from machine to machine; their name does not.
        self._place = f"tiny-{folder.name}" if folder.parent == ASSETS else str(place)
        # By the model itself: one that replaces it later has other files.
        self._files_of = {
            name: (weakref.ref(getattr(self._pipe, name)), path, _states(path))
            for name, path in parts.items()
            if name in MODELS and getattr(self._pipe, name, None) is not None
        }

    def copy_from(self, other: "Provenance") -> None:
        """Take over what another pipeline knows of the models that both share."""
        self._place, self._files_of = other._place, other._files_of

    def origin(self) -> Origin | None:
        """Return the files behind the models; None for a pipeline that was not loaded as a whole."""
        if self._place is None:
            return None
        files: dict[str, str] = {}
        replaced, revisions = [], set()
        for name in MODELS:
            model = getattr(self._pipe, name, None)
            known, path, states = self._files_of.get(name, (lambda: None, Path(), {}))
            # Files that were written or removed since are not those that the model has.
            if model is not None and (known() is not model or _states(path) != states):
                replaced.append(name)
            elif model is not None:
                parts = path.parts
                if "snapshots" in parts[:-1]:
                    revisions.add(parts[parts.index("snapshots") + 1])
                files |= {f"{name}/{file.name}": fingerprint(file) for file in states}
        revision = revisions.pop() if len(revisions) == 1 else None
        return Origin(self._place, revision, files, tuple(replaced))

    def used_loras(self) -> tuple[UsedLora, ...]:
        """Return the LoRAs that change the result: active or fused, unloaded since or not."""
        found: dict[str, dict[str, tuple[str, Any]]] = {}
        for slot in ("transformer", "transformer_2"):
            if (model := getattr(self._pipe, slot)) is not None:
                for name, (source, strength) in adapters_of(model).used().items():
                    found.setdefault(name, {})[slot] = source or "", strength
        return tuple(
            UsedLora(
                name,
                ", ".join(sorted({source for source, _ in slots.values() if source})) or None,
                {slot: strength for slot, (_, strength) in slots.items()},
                {slot: lora_fingerprint(Path(s)) for slot, (s, _) in slots.items() if Path(s).is_file()},
            )
            for name, slots in found.items()
        )

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
            "device": self.device_description(),
            "versions": {"wan22": __version__, **{name: _version(name) for name in PACKAGES}},
        }

    def check(self, recipe: Recipe) -> None:
        """Refuse, with the reason, a recipe that the pipeline as it stands would make another video from."""
        if recipe.not_reproducible_because is not None:
            why = recipe.not_reproducible_because
            raise ValueError(f"the video cannot be made again from its recipe: {printable(cut(why))}")
        now = self.run_metadata()
        if recipe.pipeline != now["pipeline"]:
            theirs = printable(cut(recipe.pipeline))
            raise ValueError(f"the recipe is one of {theirs}, this is a {now['pipeline']}")
        self._check_weights(recipe, now)
        for what in ("dtypes", "changes"):
            if (had := dict(getattr(recipe, what))) != now[what]:
                told = f"{what} {printable(cut(had))}"
                raise ValueError(f"the recipe was made with {told}; this pipeline has {cut(now[what])}")
        ratio = now["boundary_ratio"]
        if recipe.boundary_ratio != ratio:
            raise ValueError(f"the recipe's boundary_ratio is {recipe.boundary_ratio}, this one's {ratio}")
        differing = {what for what in ("device", "versions") if getattr(recipe, what) != now[what]}
        if differing:
            logger.warning("%s differ from the recipe's: results may differ by rounding", sorted(differing))

    def _check_weights(self, recipe: Recipe, now: Mapping[str, Any]) -> None:
        """Refuse a recipe of other weights or LoRAs."""
        then, here = recipe.origin, now["origin"]
        if then is not None and here is not None:
            other = sorted(
                k for k in then.files.keys() | here.files if then.files.get(k) != here.files.get(k)
            )
            if other:
                theirs = f"{printable(cut(then.place))}, this is {here.place}"
                raise ValueError(f"the recipe is of {theirs}: {printable(cut(other[0]))} is another file")
        elif recipe.checkpoint != now["checkpoint"]:
            theirs = printable(cut(recipe.checkpoint))
            raise ValueError(f"the recipe is of {theirs}, this is {now['checkpoint']}")
        if _loras(recipe.loras) != _loras(now["loras"]):
            wanted, loaded = (
                printable(cut(", ".join(f"{lora.source} at {dict(lora.strengths)}" for lora in loras)))
                for loras in (recipe.loras, now["loras"])
            )
            raise ValueError(f"the recipe has LoRAs: {wanted or 'none'}; loaded are: {loaded or 'none'}")
        if unknown := [lora.name for lora in recipe.loras if lora.strengths.keys() - lora.files.keys()]:
            logger.warning(
                "the LoRA %s was in memory: whether it is the same now cannot be told",
                printable(cut(", ".join(unknown))),
            )


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if device.type == "cpu" else str(device)


def _states(path: Path) -> dict[Path, tuple[int, ...]]:
    """Return size, time and place of each weight file that a path names; {} if they are gone."""
    try:
        stats = {file: file.stat() for file in weight_files(path)}
    except OSError:
        return {}
    return {file: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _loras(used: tuple[UsedLora, ...]) -> list[Any]:
    """Return LoRAs without their names and paths."""
    return sorted((sorted(lora.files.items()), sorted(lora.strengths.items())) for lora in used)


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
