"""The keyword arguments of a pipeline's constructors: which there are, and what they may hold."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...checkpoints.files.hub import OPTIONS
from ...checkpoints.loading.single_file import STEERING
from ...checks import check_choice, keywords_of, refuse_unknown, shown
from ...private_apis import signature_keys

SIZES = {"height", "width", "num_frames"}
BUDGET = SIZES | {"vram", "ram", "disk", "videos", "guided"}  # of a plan's arguments
# What diffusers' loader of pipelines takes beside components and the hub's options.
OF_DIFFUSERS = {
    *("custom_pipeline", "custom_revision", "dduf_file", "device_map", "load_connected_pipeline"),
    *("max_memory", "offload_folder", "provider", "provider_options", "proxies", "quantization_config"),
    *("sess_options", "torch_dtype", "trust_remote_code", "use_flashpack", "use_onnx", "variant"),
}


def check_names(method: Callable[..., Any], options: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Refuse arguments that a constructor of a pipeline does not have; `more` are names of its own."""
    pipeline: type[DiffusionPipeline] = method.__self__  # type: ignore[attr-defined]
    components, settings = signature_keys(pipeline)
    known = {*keywords_of(method), *components, *settings, *OPTIONS, *STEERING, *OF_DIFFUSERS, *more}
    refuse_unknown(f"{pipeline.__name__}.{method.__name__}", options, known)


def budget_of(memory: str | float | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `fit` that a constructor's memory stands for."""
    if not isinstance(memory, Mapping):
        return {"vram": None if memory == "auto" else memory}
    for name in memory:
        check_choice("a key of memory", name, sorted(BUDGET))
    return {"vram": None, **memory}


def arguments_of(parallel: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `parallelize` that a constructor's parallel stands for."""
    if parallel == "auto":
        return {}
    from ...accel.parallel import parallelize

    known = list(inspect.signature(parallelize).parameters)[1:]
    if not isinstance(parallel, Mapping):
        raise ValueError(
            f"parallel={shown(parallel)} must be 'auto', or a dict with some of {', '.join(known)}"
        )
    for name in parallel:
        check_choice("a key of parallel", name, known)
    return dict(parallel)


def lora_arguments(loras: Any, load: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return the arguments of `load`, `load_lora_weights`, for each LoRA of a constructor's loras."""
    many = loras if isinstance(loras, Sequence) and not isinstance(loras, str) else [loras]
    found = [
        dict(lora)
        if isinstance(lora, Mapping) and not any(isinstance(v, torch.Tensor) for v in lora.values())
        else {"pretrained_model_name_or_path_or_dict": lora}  # a table of tensors, too
        for lora in many
    ]
    for arguments in found:
        refuse_unknown("load_lora_weights", arguments, {*keywords_of(load), *OPTIONS})
    return found
