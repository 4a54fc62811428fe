"""The one way from a checkpoint to a pipeline: locate, check the budget, load, LoRAs, fit or share."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from ...accel.offload.devices import CudaDevice
from ...accel.parallel.environment import launched
from ...accel.quantization.settings import Quantization
from ...checkpoints.deferred import deferring
from ...checkpoints.files.hub import check_repository_name
from ...checks import as_path, cut, shown
from ...downloads import reaching
from ...private_apis import signature_keys
from . import preparing
from .arguments import SIZES, arguments_of, budget_of, lora_arguments
from .checkpoint import TRANSFORMERS, Checkpoint, Wanted
from .diffusers_layout import DiffusersLayout
from .official_layout import OfficialLayout, config_files
from .single_files import settings_of

_SMALL_FILES = ["model_index.json", "config.json", "*/config.json", "*.safetensors.index*.json"]


def locate(source: str, hub: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint in a folder or repository; of a repository only configurations are downloaded.

    A FileNotFoundError says if it is neither, or the repository cannot be reached.
    """
    folder = as_path(source)
    if folder.is_dir():
        layout = DiffusersLayout if (folder / "model_index.json").exists() else OfficialLayout
        return layout(source, folder, hub)
    check_repository_name(source)
    with reaching(source, options=hub):
        folder = Path(snapshot_download(source, allow_patterns=_SMALL_FILES, **hub))
    if (folder / "model_index.json").exists():
        return DiffusersLayout(source, folder, hub)
    if config_files(folder):
        return OfficialLayout(source, folder, hub)
    raise FileNotFoundError(
        f"{cut(source)} holds no pipeline: it has neither model_index.json (the Diffusers layout) nor "
        "config.json (the official one); from_single_file loads single files"
    )


def load_pipeline(
    pipeline: type[DiffusionPipeline],
    checkpoint: Checkpoint,
    wanted: Wanted,
    memory: str | float | Mapping[str, Any] | None = None,
    quantize: str | Quantization | None = None,
    parallel: str | Mapping[str, Any] | None = None,
    loras: Any = (),
    prepare: str | None = None,
) -> Any:
    """Load a pipeline and set it up; see `LoadablePipeline.from_pretrained` for the arguments."""
    shares = None if parallel is None else arguments_of(parallel)
    budget = None if memory is None else budget_of(memory)
    adapters = lora_arguments(loras, pipeline.load_lora_weights)
    check_kind(pipeline, checkpoint)
    together = shares is not None and launched()
    if shares is not None:
        from ...accel.parallel import parallelize, processes
    if together:
        processes.join()
        processes.keep_silent()
    dtype, form = None, prepare
    settings = None if quantize is None else Quantization.of(quantize)
    if form is not None:
        wanted, settings = preparing.wanted_in(form, wanted, settings)
    if settings is not None and settings.of_a_model == Quantization("fp8"):
        wanted = replace(wanted, fp8=tuple(settings.slots(TRANSFORMERS)))
    if budget is not None:
        check_budget(pipeline, checkpoint, wanted, budget, settings)
    elif together and settings is None:
        dtype, wanted = transformers_as_stored(wanted)
    if form is not None:
        from ...checkpoints.preparing import prepare as prepared_files

        prepared_files.prepare(prepared_files.preparations(checkpoint.fetch(pipeline, wanted), form))
    with deferring() if budget is not None else nullcontext():
        pipe = checkpoint.load(pipeline, wanted)
    pipe.check_components()
    if settings is not None:  # before LoRAs, which it could not take
        pipe.quantize(settings)
    for arguments in adapters:
        pipe.load_lora_weights(**arguments)
    if budget is not None:
        (pipe.fit if SIZES & budget.keys() else pipe.memory.plan_within)(**budget, quantize=settings)
    if shares is not None and together:
        parallelize(pipe, **{"dtype": dtype} | shares)
    elif shares is not None and memory is None:
        pipe.to(processes.own_device())
    return pipe


def check_kind(pipeline: type[DiffusionPipeline], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint for another pipeline, before its weights are downloaded."""
    kind = checkpoint.kind
    if kind in (None, pipeline.__name__, *pipeline.checkpoint_kinds):
        return
    public = import_module(__name__.partition(".")[0])
    others = [name for name in public.__all__ if name.endswith("Pipeline")]
    fitting = [name for name in others if kind in getattr(public, name).checkpoint_kinds]
    advice = f"use {fitting[0]}" if fitting else f"{pipeline.__name__} does not run it"
    raise ValueError(f"{checkpoint.source} is a checkpoint for {kind}; {advice}")


def check_budget(
    pipeline: type[DiffusionPipeline],
    checkpoint: Checkpoint,
    wanted: Wanted,
    budget: Mapping[str, Any],
    quantize: Quantization | None,
) -> None:
    """Refuse a budget that nothing fits into, before weights are downloaded, prepared or read.

    Where no size is given yet, that is what the smallest video takes.
    """
    from ...accel.planning.planner import plan

    outlined = outlined_pipeline(pipeline, checkpoint.outline(wanted), wanted)
    if outlined is not None:
        size = {} if SIZES & budget.keys() else smallest_size(outlined)
        plan(outlined, **{**size, **budget}, quantize=quantize)
    if budget["vram"] is not None:
        try:
            CudaDevice()
        except ValueError as error:
            raise ValueError(
                f"memory={shown(budget['vram'])} is a GPU's, and there is no CUDA device here; memory='auto' "
                "plans for the CPU"
            ) from error


def smallest_size(pipe: Any) -> dict[str, int]:
    """Return the smallest size of a pipeline's videos."""
    _, rows, columns = pipe.any_transformer.config.patch_size
    stride = pipe.vae_scale_factor_spatial
    return {"height": rows * stride, "width": columns * stride, "num_frames": 1}


def outlined_pipeline(pipeline: type[DiffusionPipeline], outline: Mapping[str, Any], wanted: Wanted) -> Any:
    """Return a pipeline whose models are on the meta device; None if the outline does not say enough."""
    names = signature_keys(pipeline)[0]
    models = {n: part for n, part in {**outline, **wanted.given}.items() if n in names}
    transformers = [models[name] for name in TRANSFORMERS if models.get(name) is not None]
    if models.get("vae") is None or not transformers:
        return None
    absent = {"tokenizer": None, "text_encoder": None}
    outlined: Any = pipeline(**absent | settings_of(transformers[0].config, len(transformers) == 2) | models)
    outlined.check_components()
    return outlined


def transformers_as_stored(wanted: Wanted) -> tuple[torch.dtype | None, Wanted]:
    """Return the transformers' dtype, None for the stored one, and what is wanted without it.

    The weights then stay mapped from their files, and are converted part by part.
    """
    dtypes = {wanted.dtype_of(name) for name in TRANSFORMERS}
    if len(dtypes) > 1 or None in dtypes:  # each its own: as on one rank
        return None, wanted
    asked = wanted.dtype if isinstance(wanted.dtype, Mapping) else {"default": wanted.dtype}
    (dtype,) = dtypes
    return dtype, replace(wanted, dtype={**asked, **dict.fromkeys(TRANSFORMERS)}, later=dtype)
