"""The three layouts a checkpoint can be written in: which files they have, and what is in each."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from ...presets import Preset, has_timestep_per_token, release_of
from ..files.quantized import QuantizedTensor, expanded
from ..loading.stored import StoredModel
from ..naming.names import listed
from .contents import EXPERTS, TOKENIZERS, Source, lost_settings

logger = logging.getLogger(__name__)

LAYOUTS = ("diffusers", "official", "single-file")
# Official names of the files that are not in folders of their own.
_VAES = {False: "Wan2.1_VAE.pth", True: "Wan2.2_VAE.pth"}
_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
# What an official config.json leaves out unless it is another value. Source: Wan2.2 wan/modules/model.py.
_OFFICIAL_DEFAULTS = {"patch_size": [1, 2, 2], "text_dim": 4096, "cross_attn_norm": True}
_NEEDED = {
    "transformer": "a transformer",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
    "tokenizer": f"a tokenizer's folder, {' or '.join(TOKENIZERS)}",
}


@dataclass(frozen=True)
class Entry:
    """One tensor's way.

    Args:
        slot: the component it is of.
        name: its name in the model.
        origin: its name in the source.
        key: its name in the file to be written.
        tensor: as the source has it.
        dtype: as it is to be written.
    """

    slot: str
    name: str
    origin: str
    key: str
    tensor: torch.Tensor | QuantizedTensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file to be written."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def values(self) -> torch.Tensor:
        """Return the values as they are to be written.

        Raises:
            ValueError: they are larger than float16 can be.
        """
        values = expanded(self.tensor)
        result = values.to(self.dtype).contiguous()
        if self.dtype == torch.float16 and (lost := result.isinf() & values.isfinite()).any():
            largest = values[lost].abs().max().item()
            raise ValueError(f"{self.origin} holds {largest:g}, float16 ends at 65504; bf16 can hold it")
        return result


@dataclass(frozen=True)
class OutputFile:
    """A weight file to be written.

    Args:
        path: inside the destination; .safetensors or .pth.
        entries: what it holds.
    """

    path: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion writes, by path inside the destination.

    Args:
        files: weights.
        texts: small JSON files.
        copies: folders to be copied as they are.
    """

    files: list[OutputFile] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(file.nbytes for file in self.files)

    def describe(self) -> Iterable[str]:
        """Yield a line for each tensor, file and folder, and one for the sum."""
        for file in self.files:
            for entry in file.entries:
                dtype, shape = str(entry.dtype).removeprefix("torch."), "×".join(map(str, entry.shape))
                yield f"{entry.origin} → {entry.key}  {dtype}  {shape}  {file.path}"
        for path in self.texts:
            yield f"settings → {path}"
        for path, folder in self.copies.items():
            yield f"{folder} → {path}"
        tensors = sum(len(file.entries) for file in self.files)
        yield f"{tensors} tensors, {self.nbytes / 1e9:.3g} GB, in {len(self.files)} files"


def make_plan(source: Source, to: str, name: str, dtype: torch.dtype | None, shard_size: int) -> Plan:
    """Say what has to be written.

    Args:
        source: what there is.
        to: one of `LAYOUTS`.
        name: of the file in which a single model is to be.
        dtype: of all tensors; None: as they are stored, bfloat16 for those that are quantised.
        shard_size: bytes of the largest file, where a layout has shards.

    Raises:
        FileNotFoundError: the source lacks a component that the layout has.
        ValueError: the source has a component that the layout has no place for.
    """
    plan = Plan()
    for slot, content in source.models.items():
        path = _path_of(content, slot, to, source, name)
        entries = _entries(content, slot, to, dtype)
        sharded = to != "single-file" and path.endswith(".safetensors")
        files, index = _shards(path, entries, shard_size if sharded else None)
        plan.files.extend(files)
        plan.texts.update(index)
        if to == "diffusers":
            plan.texts[str(Path(path).with_name("config.json"))] = _json(_config(content, entries))
        elif to == "official" and content.kind == "transformer":
            plan.texts[str(Path(path).with_name("config.json"))] = _json(_official_config(content))
        if to != "diffusers" and (lost := lost_settings(content, to)):
            logger.warning(
                "%s: the %s layout does not keep %s; who loads it must give them",
                *(content.source, to, ", ".join(lost)),
            )
    if source.whole:
        _plan_repository(plan, source, to)
    return plan


def _path_of(content: StoredModel, slot: str, to: str, source: Source, name: str) -> str:
    """Return where a model's weights go, not yet divided into shards."""
    two = "transformer_2" in source.models
    expert = EXPERTS[slot == "transformer_2"]
    if to == "single-file":
        names = {"transformer": expert if two else slot, "transformer_2": expert}
        return f"{names.get(slot, slot)}.safetensors" if source.whole else name
    if to == "official" and content.kind == "vae":
        return _VAES[content.settings["is_residual"]]
    if to == "official" and content.kind == "text_encoder":
        return _TEXT_ENCODER
    folder = slot if to == "diffusers" else expert if two else ""
    file = "model" if content.kind == "text_encoder" else "diffusion_pytorch_model"
    return str(Path(folder if source.whole else "", f"{file}.safetensors"))


def _entries(content: StoredModel, slot: str, to: str, dtype: torch.dtype | None) -> list[Entry]:
    entries = []
    for name, official in content.official_names.items():
        tensor = content.tensors[name]
        stored = torch.bfloat16 if isinstance(tensor, QuantizedTensor) else tensor.dtype
        key = name if to == "diffusers" else official
        entries.append(Entry(slot, name, content.origins[name], key, tensor, dtype or stored))
    return entries


def _shards(path: str, entries: list[Entry], limit: int | None) -> tuple[list[OutputFile], dict[str, str]]:
    """Divide tensors among files; return those, and their index if they are several."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if limit is not None and groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return [OutputFile(path, tuple(entries))], {}
    stem = path.removesuffix(".safetensors")
    files = [
        OutputFile(f"{stem}-{i:05}-of-{len(groups):05}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    ]
    places = {entry.key: Path(file.path).name for file in files for entry in file.entries}
    total = sum(file.nbytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return files, {f"{path}.index.json": _json(index)}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


# ---- settings ----


def _config(content: StoredModel, entries: list[Entry]) -> dict[str, Any]:
    """Return config.json of the Diffusers layout."""
    if content.kind != "text_encoder":
        return dict(content.settings)
    sizes: Counter[torch.dtype] = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.nbytes
    # transformers loads in this dtype, whatever the file holds.
    return {**content.settings, "dtype": str(sizes.most_common(1)[0][0]).removeprefix("torch.")}


def _official_config(content: StoredModel) -> dict[str, Any]:
    """Return config.json of the official layout."""
    settings = content.settings
    known = {
        "_class_name": "WanModel",
        "_diffusers_version": diffusers.__version__,
        "dim": settings["num_attention_heads"] * settings["attention_head_dim"],
        "eps": settings["eps"],
        "ffn_dim": settings["ffn_dim"],
        "freq_dim": settings["freq_dim"],
        "in_dim": settings["in_channels"],
        "model_type": _task(settings),
        "num_heads": settings["num_attention_heads"],
        "num_layers": settings["num_layers"],
        "out_dim": settings["out_channels"],
        "text_len": 512,
    }
    return known | {n: settings[n] for n, default in _OFFICIAL_DEFAULTS.items() if settings[n] != default}


def _task(settings: Mapping[str, Any]) -> str:
    """Return the official word for what a transformer is for."""
    if has_timestep_per_token(settings):
        return "ti2v"
    if settings["in_channels"] == settings["out_channels"]:
        return "t2v"
    return "i2v" if settings["pos_embed_seq_len"] is None else "flf2v"


# ---- repositories ----


def _plan_repository(plan: Plan, source: Source, to: str) -> None:
    found = {**source.models, **({"tokenizer": source.tokenizer} if source.tokenizer else {})}
    complete = to == "single-file" or (to == "diffusers" and source.index is not None)
    if not complete and (missing := [what for part, what in _NEEDED.items() if part not in found]):
        raise FileNotFoundError(
            f"{source.path} lacks {' and '.join(missing)}; put it there, or convert each file by itself"
        )
    if source.tokenizer is not None:
        plan.copies[TOKENIZERS[0] if to == "official" else "tokenizer"] = source.tokenizer
    if to != "diffusers":
        if others := source.folders.keys() - {"scheduler"}:
            raise ValueError(
                f"{source.path} has {listed(others)}, for which the {to} layout has no name; convert "
                "the folders of the other components one by one, or the whole to diffusers"
            )
        _warn_of_lost_schedule(source, to)
    elif source.index is not None:  # whose settings are somebody's choice
        plan.copies.update(source.folders)
        plan.texts["model_index.json"] = _json(source.index)
    else:
        preset = _release(source)
        plan.texts["scheduler/scheduler_config.json"] = _scheduler(preset.flow_shift)
        plan.texts["model_index.json"] = _json(_model_index(source, preset))


def _release(source: Source) -> Preset:
    experts = 1 + ("transformer_2" in source.models)
    return release_of(source.models["transformer"].settings, experts)


def _scheduler(shift: float) -> str:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    return scheduler.to_json_string()


def _model_index(source: Source, preset: Preset) -> dict[str, Any]:
    """Return model_index.json of the Diffusers layout."""
    settings = source.models["transformer"].settings
    image = settings["in_channels"] != settings["out_channels"]
    two = "transformer_2" in source.models
    model = ["diffusers", "WanTransformer3DModel"]
    index = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": preset.boundary_ratio if two else None,
        "expand_timesteps": has_timestep_per_token(settings),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", _tokenizer_class(source)],
        "transformer": model,
        "transformer_2": model if two else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    empty = {"image_encoder": [None, None], "image_processor": [None, None]}
    return index | (empty if image else {})


def _tokenizer_class(source: Source) -> str:
    config = source.tokenizer / "tokenizer_config.json" if source.tokenizer else Path()
    name = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    return "T5TokenizerFast" if name in (None, "T5Tokenizer") else str(name)


def _warn_of_lost_schedule(source: Source, to: str) -> None:
    """Say what a Diffusers repository's settings are where only those of the release can be kept."""
    if source.index is None or "transformer" not in source.models:
        return
    preset, config = _release(source), source.folders.get("scheduler", Path()) / "scheduler_config.json"
    chosen = {"boundary_ratio": source.index.get("boundary_ratio")}
    if config.is_file():
        chosen["flow_shift"] = json.loads(config.read_text()).get("flow_shift")
    for name, value in chosen.items():
        if value not in (None, official := getattr(preset, name)):
            logger.warning(
                "%s: the %s layout does not keep %s %s; loaders take %s's %s",
                *(source.path, to, name, value, preset.name, official),
            )
