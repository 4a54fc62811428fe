"""How a pipeline reads and writes the Diffusers layout with this library's classes in it.

diffusers imports the module that model_index.json names for each component and takes the class from there. A
repository says "diffusers"; here that is read as this module, which holds our class under diffusers' name,
and written back on save. So every argument of diffusers' from_pretrained works, and plain diffusers reads
what we save.
"""

import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .. import __version__
from ..checkpoints.files.hub import OPTIONS, check_repository_name
from ..checkpoints.files.safetensors import stored_dtype
from ..checkpoints.loading.fill import empty_weights
from ..checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ..checkpoints.loading.quantized_linear import expanded_state
from ..models import autoencoder, transformer
from ..presets import CONVERTED_FLOW_SHIFT, Preset
from ..schedulers import FlowMatchDPMSolverScheduler as DPMSolverMultistepScheduler
from ..schedulers import FlowMatchEulerScheduler as FlowMatchEulerDiscreteScheduler
from ..schedulers import FlowMatchUniPCScheduler as UniPCMultistepScheduler
from .provenance import COMPONENTS, ProvenancePipeline
from .schedule import reshifted, scheduler_shift

logger = logging.getLogger(__name__)

# What diffusers' loader looks up in this module: our classes under the names of model_index.json, and the
# bases by which it tells models from schedulers.
__all__ = [
    "AutoencoderKLWan",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HubPipeline",
    "ModelMixin",
    "SchedulerMixin",
    "UniPCMultistepScheduler",
    "WanTransformer3DModel",
    "adopt",
]
# diffusers' pipelines, and ours for their checkpoints.
_PIPELINES = {"WanPipeline": "WanT2VPipeline", "WanImageToVideoPipeline": "WanI2VPipeline"}
_MODELS = {"WanTransformer3DModel": WanTransformer3DModel, "AutoencoderKLWan": AutoencoderKLWan}
_VAE_SETTINGS = {"use_slicing", "use_tiling"} | {
    f"tile_sample_{what}_{axis}" for what in ("min", "stride") for axis in ("height", "width")
}
# Both may stand in model_index.json; diffusers ignores them. The first says that the settings in the folder
# are somebody's choice; the second names a folder, next to this one, that has the components missing here.
_MARK = "_wan22_version"
_REST = "_components_from"
_SAVED = "_saved_class_name"  # only in memory: the pipeline that model_index.json names


class HubPipeline(ProvenancePipeline, DiffusionPipeline):
    """Base of the pipelines: from_pretrained, save_pretrained and from_pipe with our classes.

    A subclass names the diffusers pipeline it stands for in `_hub_class_name`.
    """

    _hub_class_name: str
    scheduler: Any

    @property
    def released(self) -> Preset | None:
        """The released checkpoint that the loaded configs belong to; None if it is an unknown one."""
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline from a folder or a hub repository in the Diffusers layout.

        Args:
            pretrained_model_name_or_path: folder, or repository such as "Wan-AI/Wan2.2-T2V-A14B-Diffusers".
            **kwargs: those of diffusers' `DiffusionPipeline.from_pretrained`, such as `revision`,
                `cache_dir`, `token`, `local_files_only`, `variant`, `device_map`, `quantization_config`;
                any component, ready made, or None to leave it out. `dtype` (or `torch_dtype`): of all
                components, or a dict by component and "default"; None, which is the default, there or in the
                dict is the one that each is stored in.

        Returns: the pipeline.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: a setting or a combination of components that is not supported.
        """
        source = str(pretrained_model_name_or_path)
        folder = str(Path(source).expanduser())
        local = Path(folder).is_dir()
        if not local:
            check_repository_name(source)
        access = {name: kwargs[name] for name in OPTIONS & kwargs.keys()}
        # A checkpoint of another task is refused before its weights are downloaded.
        config = cls.load_config(folder if local else source, **access)
        task = config[_SAVED]
        # TI2V-5B serves both tasks, under whichever name it was saved.
        both = config.get("expand_timesteps") and task in _PIPELINES
        if task not in (cls._hub_class_name, cls.__name__) and not both:
            other = f"use {_PIPELINES[task]}" if task in _PIPELINES else f"{cls.__name__} does not run it"
            raise ValueError(f"{source} is a checkpoint for {task}; {other}")
        if not local:  # here, so that the stored dtypes are known before anything is loaded
            folder = cls.download(
                source, **{k: v for k, v in kwargs.items() if k not in ("dtype", "torch_dtype")}
            )
        rest, given = _folder_of_rest(Path(folder), config), dict(kwargs)
        asked = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
        if asked is None or (isinstance(asked, dict) and None in asked.values()):
            stored = _stored_dtypes([*rest, Path(folder)], kwargs.get("variant"))
            asked = _with_stored(asked or {"default": None}, stored)
        kwargs["dtype"] = asked
        for neighbour in rest:
            listed = {name for name, entry in config.items() if isinstance(entry, list) and entry[0]}
            missing = {name for name in listed - kwargs.keys() if not (Path(folder) / name).exists()}
            kwargs |= cls._load_components(neighbour, missing, kwargs)
        pipe = cls._load(folder, **kwargs)
        pipe.register_to_config(_name_or_path=source)
        homes = [*rest, Path(folder)]
        found = {name: home / name for home in homes for name in COMPONENTS if (home / name).is_dir()}
        pipe.came_from(source, {name: path for name, path in found.items() if given.get(name) is None})
        if kwargs.get("scheduler") is None and _MARK not in config:
            pipe.correct_shift()
        return pipe

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save all components, as diffusers does; quantised weights are expanded."""
        with expanded_state():
            super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Build this pipeline from another one's components, sharing their weights; nothing is cast.

        Args:
            pipeline: one of ours or of diffusers' Wan pipelines.
            **kwargs: components and settings that replace the other's.
        """
        components, settings = cls._get_signature_keys(cls)
        known = {
            **pipeline.components,
            **{k: v for k, v in pipeline.config.items() if k in settings},
            **kwargs,
        }
        unknown = sorted(set(kwargs) - set(components) - set(settings))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(components + settings)}"
            )
        pipe = cls(**{name: value for name, value in known.items() if name in (*components, *settings)})
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        if isinstance(pipeline, ProvenancePipeline):
            pipe._place, pipe._files_of = pipeline._place, pipeline._files_of
        return pipe

    @classmethod
    def _load(cls, folder: str, **options: Any) -> Any:
        """Load a folder as diffusers does."""
        return super().from_pretrained(folder, **options)

    @classmethod
    def _load_components(cls, folder: Path, names: set[str], options: dict[str, Any]) -> dict[str, Any]:
        """Load some of a checkpoint's components, as `from_pretrained` with these options would."""
        # They make no pipeline that could be checked.
        unchecked: Any = type(cls.__name__, (cls,), {"check_components": lambda self: None})
        absent = dict.fromkeys(set(cls._get_signature_keys(cls)[0]) - names)
        parts = unchecked._load(str(folder), **options | absent)
        return {name: parts.components[name] for name in names}

    def correct_shift(self) -> None:
        """Give a converted repository of a released checkpoint the official shift.

        diffusers' conversion script writes the same 3.0 for every Wan checkpoint but TI2V-5B, and a
        repository that still has it gets worse videos than the official code.
        """
        preset = self.released
        if (
            preset is not None
            and scheduler_shift(self.scheduler) == CONVERTED_FLOW_SHIFT != preset.flow_shift
        ):
            logger.info(
                "flow_shift %g replaced by %s's %g", CONVERTED_FLOW_SHIFT, preset.name, preset.flow_shift
            )
            self.scheduler = reshifted(self.scheduler, preset.flow_shift)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read model_index.json; what we have a class for is looked up here instead of in diffusers.

        That goes for the pipeline, too: diffusers would import its own of this name, to no end.
        """
        loaded = super().load_config(*args, **kwargs)
        config, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        config = {
            name: [__name__, value[1]]
            if isinstance(value, (list, tuple))
            and len(value) == 2
            and value[0] == "diffusers"
            and value[1] in __all__
            else value
            for name, value in config.items()
        }
        config |= {"_class_name": cls.__name__, _SAVED: config["_class_name"]}
        # TI2V-5B may name, as absent, what only the other pipeline could have.
        known = {name for names in cls._get_signature_keys(cls) for name in names}
        absent = [name for name, value in config.items() if value == [None, None] and name not in known]
        for name in absent:
            del config[name]
        return (config, *rest) if rest else config

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # Empty annotations skip diffusers' own type warnings: `adopt` takes both families' classes.
        names = list(inspect.signature(cls.__init__).parameters)[1:]  # without self
        return dict.fromkeys(names, (inspect.Signature.empty,))

    def to_json_string(self) -> str:
        """Write model_index.json with diffusers' names."""
        config = json.loads(super().to_json_string())
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and str(value[0]).split(".")[0] == "wan22":
                component = getattr(self, name)
                schema = getattr(component, "schema", None)
                config[name] = ["diffusers", schema.class_name if schema else value[1]]
        config["_class_name"] = self._hub_class_name
        config[_MARK] = __version__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def adopt(component: Any) -> Any:
    """Return our model for one of diffusers' own, sharing its weights; anything else as it is.

    Raises:
        ValueError: the model was changed since it was loaded, by a LoRA or a quantiser say.
    """
    ours = _MODELS.get(type(component).__name__)
    if ours is None or isinstance(
        component, (autoencoder.AutoencoderKLWan, transformer.WanTransformer3DModel)
    ):
        return component
    with empty_weights():
        model = ours.from_config(component.config)
    weights = component.state_dict()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in weights.items()}:
        name = type(component).__name__
        raise ValueError(
            f"this {name} of diffusers was changed since it was loaded; load it with wan22.{name}"
        )
    model.load_state_dict(weights, assign=True)
    for setting in _VAE_SETTINGS & vars(component).keys():
        setattr(model, setting, getattr(component, setting))
    return model.eval()


def _folder_of_rest(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the folder that has the components missing in this one, if model_index.json names any."""
    if _REST not in config:
        return []
    other = folder.parent / Path(config[_REST]).name
    if not (other / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} shares components of {other}, which is no checkpoint")
    return [other]


def _with_stored(
    asked: dict[str, torch.dtype | None], stored: dict[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Return the dtypes asked for by component, with the stored ones where those are asked for."""
    if asked.get("default") is None:
        asked = dict.fromkeys(stored) | asked
    return {name: stored.get(name, stored["default"]) if d is None else d for name, d in asked.items()}


def _stored_dtypes(folders: Sequence[Path], variant: str | None) -> dict[str, torch.dtype]:
    dtypes = {
        child.name: stored_dtype(child, variant)
        for folder in folders
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }
    return {"default": torch.float32, **{name: dtype for name, dtype in dtypes.items() if dtype is not None}}
