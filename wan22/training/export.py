"""The file that comes out: a LoRA with ComfyUI's generic names, and what it was trained on in its header."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoints.lora.saving import PREFIX, diffusers_state, official_tensors
from ..whole_files import whole_file
from .adapters import ADAPTER
from .config import TrainConfig

SUFFIXES = {"transformer": "_high_noise", "transformer_2": "_low_noise"}
OF_DIFFUSERS = "transformer."
_DOWN = ".lora_A.weight"


def file_name(config: TrainConfig, slot: str, experts: int) -> str:
    """Return the name of an expert's file."""
    return f"{config.name}{SUFFIXES[slot] if experts == 2 else ''}.safetensors"


def write_lora(path: Path, model: Any, metadata: Mapping[str, str], diffusers_names: bool = False) -> None:
    """Write a trained LoRA in bfloat16.

    Under the official names its alphas are its ranks, alpha / rank being in the matrices: whether or not a
    reader looks for alphas, it computes with the strength that was trained.

    Args:
        path: the file.
        model: the transformer.
        metadata: the header.
        diffusers_names: whether names are those of diffusers and PEFT in place of the official ones.
    """
    header = dict(metadata)
    if diffusers_names:
        state, config = diffusers_state(model, ADAPTER)
        tensors = {f"{OF_DIFFUSERS}{name}": tensor for name, tensor in state.items()}
        entries = {f"{OF_DIFFUSERS}{name}": value for name, value in config.items()}
        header["lora_adapter_metadata"] = json.dumps(entries, sort_keys=True)
    else:
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in official_tensors(model, ADAPTER)}
    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}
    if not diffusers_names:
        ranks = {n.removesuffix(_DOWN): len(t) for n, t in tensors.items() if n.endswith(_DOWN)}
        tensors |= {f"{name}.alpha": torch.tensor(float(rank)) for name, rank in ranks.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, header | {"sshs_model_hash": _hash(tensors)})


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of a file's tensors: two files of one hash are the same, whatever their headers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metadata_of(
    config: TrainConfig, checkpoint: str, slot: str, span: tuple[float, float], facts: Mapping[str, Any]
) -> dict[str, str]:
    """Return the header: what the LoRA is of, as modelspec and kohya's trainers have it.

    Args:
        config: the settings.
        checkpoint: the checkpoint's name.
        slot: the transformer.
        span: lowest and highest noise level that it was trained for.
        facts: further entries, such as the number of steps and of clips.
    Source: Stability's modelspec 1.0.0; musubi-tuner's ss_* entries.
    """
    expert = SUFFIXES[slot].strip("_").replace("_", " ")
    low, high = (round(1000 * level) for level in span)
    entries: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{checkpoint.lower()}/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "modelspec.title": config.name,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.timestep_range": f"{low},{high}",
        "ss_base_model_version": checkpoint,
        "ss_network_module": f"wan22.{config.method}",
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.rank,  # in the matrices
        "ss_network_args": json.dumps({"targets": config.targets, "alpha_in_training": config.alpha}),
        "ss_learning_rate": config.learning_rate,
        "ss_optimizer": config.optimizer,
        "ss_lr_scheduler": config.schedule,
        "ss_seed": config.seed,
        "ss_mixed_precision": config.dtype,
        "ss_timestep_sampling": config.sampling,
        "ss_sigmoid_scale": config.std,
        "ss_weighting_scheme": config.weighting,
        "ss_output_name": config.name,
        "wan22.expert": expert if span != (0.0, 1.0) else "",
        "wan22.settings": json.dumps(config.plain()),
        **facts,
    }
    return {name: str(value) for name, value in entries.items() if value not in (None, "")}
