"""The Diffusers layout: model_index.json, and a folder for each component."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...accel.planning.meta_models import store_as
from ...checkpoints.files.damage import errors_named
from ...checkpoints.files.folders import names_of
from ...checkpoints.files.safetensors import stored_dtype
from ...checkpoints.files.weights import read_json
from ...checkpoints.loading.models import WanTransformer3DModel, needs_diffusers
from ...checkpoints.loading.recognize import FORMATS, read_model
from ...checkpoints.loading.stored import StoredModel
from ...checkpoints.naming.schemas import read_config
from ...presets import CONVERTED_FLOW_SHIFT
from ...schedulers import FlowMatchUniPCScheduler
from ..call.schedule import reshifted, scheduler_shift
from . import preparing
from .checkpoint import KINDS, PREPARED, TRANSFORMERS, Outline, Wanted, is_folder
from .components import OURS, WEIGHTS, check_components, find_weights, load_encoders
from .hub_classes import load_own_scheduler
from .index import check_classes, check_index
from .single_files import SingleFiles

logger = logging.getLogger(__name__)

# Stands in model_index.json, where diffusers ignores it: the settings in the folder are somebody's choice.
MARK = "_wan22_version"
# Stands there, too: module and name of a scheduler's class that is not the one that the entry would load.
OWN_SCHEDULER = "_wan22_scheduler"
# Classes of models that our own loader reads as theirs do.
_READ = ("WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


class DiffusersLayout:
    """A checkpoint in the Diffusers layout: a folder, or a repository whose configurations are in `folder`.

    `hub` are options of the download.
    """

    def __init__(self, source: str, folder: Path, hub: Mapping[str, Any]) -> None:
        self.source, self.hub = source, hub
        self.downloads = FILES
        self.path = folder / "model_index.json"
        check_index(self.path)
        index = DiffusionPipeline.load_config(folder)
        self.folder, self.index = folder, index
        self.kind = index.get("_class_name")
        if index.get("expand_timesteps") and self.kind in _PIPELINES:
            self.kind = "ti2v"  # which serves both tasks, under whichever name it was saved

    def outline(self, wanted: Wanted) -> Outline:
        """Return the models that there are configurations of, without reading weights."""
        outline: Outline = {}
        variant = wanted.others.get("variant")
        prepared = preparing.find_all(self._stored_models(self.folder, wanted), wanted)
        for name in KINDS:
            folder = self.folder / name
            if name in prepared:
                outline[name] = prepared[name].meta_model()
                continue
            if (folder / "config.json").is_file() and name not in wanted.given:
                format = FORMATS[KINDS[name]]
                model: Any = format.build(read_config(folder / "config.json", format.schema))
                stored = stored_dtype(folder, variant)
                if stored is None and list(folder.glob("*.safetensors")):  # float8, which stays so
                    outline.update(SingleFiles({name: folder}).outline(wanted))
                    continue
                stored = stored or indexed_dtype(folder, variant, model)
                stored = stored or torch.bfloat16
                store_as(model, wanted.dtype_of(name) or stored, stored)
                outline[name] = model
        return outline

    def fetch(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> dict[str, StoredModel]:
        """Return the models that can be prepared, by component; a repository is downloaded first."""
        if needs_diffusers(wanted.others):
            rule = "does not go with prepare, whose weights our own loader maps"
            raise ValueError(f"{', '.join(sorted(wanted.others.keys() - {'variant'}))} {rule}")
        models = self._stored_models(self._download(pipeline, wanted), wanted)
        return {name: stored for name, stored in models.items() if name in PREPARED}

    def load(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Any:
        """Load a pipeline as diffusers does, with all of its options; a repository is downloaded first."""
        options = {**self.hub, **wanted.given, **wanted.others}
        check_classes(self.path, self.index, pipeline, wanted.given)
        folder = self._download(pipeline, wanted)  # so that the dtypes are known before anything is loaded
        if wanted.dequantize:  # which diffusers' loader cannot ask for
            for name in TRANSFORMERS:
                if name not in wanted.given and (folder / name).is_dir():
                    dtype, variant = wanted.dtype_of(name), wanted.others.get("variant")
                    options[name] = WanTransformer3DModel.from_pretrained(
                        folder / name, dtype=dtype, dequantize=True, variant=variant
                    )
        check_components(folder, self.index, wanted)
        own = self.index.get(OWN_SCHEDULER)
        if own and "scheduler" not in options and (own := load_own_scheduler(own, folder / "scheduler")):
            options["scheduler"] = own
        models = self._stored_models(folder, wanted)
        prepared = preparing.find_all(models, wanted)
        preparing.report(self.source, models, prepared, wanted)
        for name, model in preparing.load_prepared(prepared).items():
            if name in OURS:  # the source's names, as of any other load
                model.register_to_config(_name_or_path=str(folder / name))
            else:
                model.config.name_or_path = model.name_or_path = str(folder / name)
            options[name] = model
        left = {name: stored for name, stored in models.items() if name not in prepared}
        dtypes = dtypes_in(folder, wanted)
        with preparing.loading_bar(left, wanted):
            options |= load_encoders(folder, self.index, wanted, dtypes, prepared)
            with errors_named(folder):
                pipe = pipeline.from_diffusers_folder(folder, dtype=dtypes, **options)
        pipe.register_to_config(_name_or_path=self.source)
        loaded = [name for name in KINDS if (folder / name).is_dir() and wanted.given.get(name) is None]
        pipe.provenance.record_source([self.source], {name: folder / name for name in loaded})
        if wanted.given.get("scheduler") is None and MARK not in self.index:
            correct_shift(pipe)
        return pipe

    def _download(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Path:
        """Return the folder that holds the checkpoint."""
        if is_folder(self.source):
            return self.folder
        return Path(pipeline.download(self.source, **{**self.hub, **wanted.given, **wanted.others}))

    def _stored_models(self, folder: Path, wanted: Wanted) -> dict[str, StoredModel]:
        """Return the models that get a dtype, whose weights are here and our own loader reads."""
        if needs_diffusers(wanted.others):
            return {}
        variant, found = wanted.others.get("variant"), {}
        for name in KINDS:
            place, entry = folder / name, self.index.get(name)
            known = bool(entry) and entry[1] in _READ and name not in wanted.given
            if not known or (wanted.later or wanted.dtype_of(name)) is None:
                continue
            config = read_config(place / "config.json")
            if not config or "quantization_config" in config:
                continue
            names = names_of(WEIGHTS[name], wanted.others.get("use_safetensors"))
            try:
                found[name] = read_model(find_weights(place, variant, names), KINDS[name], config)
            except (FileNotFoundError, ValueError):  # not downloaded yet; or the loader says what is wrong
                continue
        return found


def indexed_dtype(folder: Path, variant: str | None, model: nn.Module) -> torch.dtype | None:
    """Return the dtype in which shards that are not here are stored, told from the size in their index."""
    ending = f".{variant}" if variant else ""
    for index in folder.glob(f"*.safetensors.index{ending}.json"):
        size = read_json(index).get("metadata", {}).get("total_size", 0)
        itemsize = round(size / sum(parameter.numel() for parameter in model.parameters()))
        return {2: torch.bfloat16, 4: torch.float32}.get(itemsize)
    return None


def dtypes_in(folder: Path, wanted: Wanted) -> dict[str, torch.dtype | None]:
    """Return the dtypes to load a folder's components in, the stored ones where none is asked for.

    None is for our own models in float8, whose loader keeps each tensor as it is stored.
    """
    names = ["default", *(path.name for path in sorted(folder.iterdir()) if path.is_dir())]
    stored = {name: stored_dtype(folder / name, wanted.others.get("variant")) for name in names}
    found = {name: wanted.dtype_of(name) or dtype for name, dtype in stored.items()}
    known = {name: dtype for name, dtype in found.items() if dtype is not None or name in OURS}
    return {"default": torch.float32} | known


def correct_shift(pipe: Any) -> None:
    """Give a converted repository of a released checkpoint the official shift.

    diffusers' conversion script writes UniPC with 3.0 for all of them but TI2V-5B, and videos get worse with
    it. Any other scheduler is somebody's choice.
    """
    if not isinstance(pipe.scheduler, FlowMatchUniPCScheduler):
        return
    preset, shift = pipe.released, scheduler_shift(pipe.scheduler)
    if preset is not None and shift == CONVERTED_FLOW_SHIFT != preset.flow_shift:
        logger.info("flow_shift %g replaced by %s's %g", CONVERTED_FLOW_SHIFT, preset.name, preset.flow_shift)
        pipe.scheduler = reshifted(pipe.scheduler, preset.flow_shift)
