"""Save a model's weights in the Diffusers layout, in files whose tensors are aligned."""

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from ...checks import as_path, keywords_of, refuse_unknown
from ..files.folders import DIFFUSERS
from ..files.safetensors import StoredTensor, can_be_written, write_safetensors
from ..files.weights import as_json

STEM, SUFFIX = DIFFUSERS[0]
# Arguments of diffusers' save_pretrained for which it does the work itself.
_OF_DIFFUSERS = ("save_function", "push_to_hub", "use_flashpack")
# Arguments of diffusers' methods that are not in their signatures: of pushing to the hub.
_OF_PUSHING = ("commit_message", "create_pr", "private", "repo_id", "token")


def check_saving(method: Callable[..., Any], options: Iterable[str]) -> None:
    """Refuse arguments that a `save_pretrained` does not have, which diffusers would ignore."""
    what = f"{type(method.__self__).__name__}.save_pretrained"  # type: ignore[attr-defined]
    refuse_unknown(what, options, {*keywords_of(method), "merge_lora", *_OF_PUSHING})


def save_aligned(model: Any, *args: Any, **kwargs: Any) -> bool:
    """Do what diffusers' `save_pretrained` does with these arguments; return False if it has to.

    Files appear when they are whole: a model may be saved over the files that it is mapped from.
    """
    given = inspect.signature(ModelMixin.save_pretrained).bind(model, *args, **kwargs)
    given.apply_defaults()
    options, folder = given.arguments, as_path(given.arguments["save_directory"])
    others = any(options[name] for name in _OF_DIFFUSERS if name in options)
    quantized = getattr(model, "hf_quantizer", None) is not None
    if others or quantized or not options["safe_serialization"] or folder.is_file():
        return False
    state = model.state_dict()
    if not all(can_be_written(tensor) for tensor in state.values()):  # as where ranks have divided them
        return False
    folder.mkdir(parents=True, exist_ok=True)
    main, variant = options["is_main_process"], options["variant"]
    if main:
        model.save_config(folder)
    _write(state, folder, variant, options["max_shard_size"], main)
    return True


def _write(
    state: dict[str, torch.Tensor], folder: Path, variant: str | None, limit: int | str, main: bool
) -> None:
    ending = f".{variant}" if variant else ""
    pattern = f"{STEM}{ending}{{suffix}}.{SUFFIX}"
    split = split_torch_state_dict_into_shards(state, max_shard_size=limit, filename_pattern=pattern)
    for name, keys in split.filename_to_tensors.items():
        unfinished = folder / f"{name}.unfinished"
        write_safetensors(unfinished, [StoredTensor(key, _plain(state[key])) for key in keys])
        unfinished.replace(folder / name)
    index = folder / f"{STEM}.{SUFFIX}.index{ending}.json"
    if split.is_sharded:
        places = dict(sorted(split.tensor_to_filename.items()))
        index.write_text(as_json({"metadata": dict(split.metadata), "weight_map": places}))
    if main:  # what an earlier save has left and this one does not name
        shard = re.compile(rf"{re.escape(STEM + ending)}-\d{{5}}-of-\d{{5}}\.{SUFFIX}")
        for path in folder.iterdir():
            if shard.fullmatch(path.name) and path.name not in split.filename_to_tensors:
                path.unlink()
        if not split.is_sharded:
            index.unlink(missing_ok=True)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data if isinstance(tensor, nn.Parameter) else tensor.detach()
