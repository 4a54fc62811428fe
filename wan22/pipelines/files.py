"""Pipelines from files that are not in the Diffusers layout: official folders, single files of any format."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ..checkpoints.converting.contents import EXPERTS, TOKENIZERS
from ..checkpoints.files.hub import OPTIONS
from ..checkpoints.loading.image_encoder import load_image_encoder, load_image_processor
from ..checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ..checkpoints.loading.text_encoder import load_text_encoder
from ..presets import Preset, find_preset, has_timestep_per_token, release_of
from ..schedulers import FlowMatchUniPCScheduler
from ..video.progress import progress_bar
from .hub import HubPipeline

TOKENIZER = TOKENIZERS[0]
_CLIP = "models_clip*.pth"
# What an official repository holds, and no more of it than is read.
OFFICIAL_CONFIGS = ("config.json", *(f"{folder}/config.json" for folder in EXPERTS))
OFFICIAL_FILES = (
    *OFFICIAL_CONFIGS,
    *("*.safetensors", "*.safetensors.index.json"),  # in any folder
    *("models_t5*.pth", "*VAE.pth", _CLIP, f"{TOKENIZER}/*"),
)

Dtypes = torch.dtype | Mapping[str, torch.dtype] | None


# Official names of tasks, and who runs them.
_TASKS = {
    "t2v": ("WanT2VPipeline",),
    "i2v": ("WanI2VPipeline",),
    "flf2v": ("WanI2VPipeline",),
    "ti2v": ("WanT2VPipeline", "WanI2VPipeline"),
}


@dataclass(frozen=True)
class Files:
    """Where a pipeline's components are.

    Args:
        transformer: of the high-noise expert, or the only one; a file, or a folder with shards.
        transformer_2: of the low-noise expert.
        vae: file.
        text_encoder: file.
        tokenizer: folder.
        image_encoder: file of Wan 2.1's CLIP.
    """

    transformer: Path | None = None
    transformer_2: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    image_encoder: Path | None = None


def find_official(source: str, hub: Mapping[str, Any]) -> Path | None:
    """Return the folder of a checkpoint in the official layout; None if it is in the Diffusers layout.

    Of a repository, only the configurations are downloaded.

    Args:
        source: folder or repository.
        hub: options of the download.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            patterns = ["model_index.json", *OFFICIAL_CONFIGS]
            folder = Path(snapshot_download(source, allow_patterns=patterns, **hub))
        except (OSError, ValueError):  # not there, or not reached: diffusers says what is wrong
            return None
        return folder if _configs(folder) and not (folder / "model_index.json").exists() else None
    return None if (folder / "model_index.json").exists() else folder


def official_task(folder: Path) -> str | None:
    """Return the kind of checkpoint that an official folder's config.json names, such as "t2v" or "ti2v"."""
    return next((json.loads(path.read_text()).get("model_type") for path in _configs(folder)), None)


def official_preset(folder: Path) -> Preset | None:
    """Return the released checkpoint that an official folder's configurations belong to."""
    configs = [json.loads(path.read_text()) for path in _configs(folder)]
    known = [config for config in configs if {"dim", "in_dim"} <= config.keys()]
    if not known:
        return None
    first = known[0]
    preset = find_preset(
        dim=first["dim"],
        in_channels=first["in_dim"],
        experts=2 if len(known) > 1 else 1,
        two_frames=first.get("model_type") == "flf2v",
    )
    return preset if preset is not None and preset.repo else None


def _configs(folder: Path) -> list[Path]:
    return [folder / name for name in OFFICIAL_CONFIGS if (folder / name).is_file()]


def official_files(folder: Path) -> Files:
    """Find the components in a folder of the official layout.

    Raises:
        FileNotFoundError: it is none, or something is missing; it is named.
    """
    experts = [folder / name for name in EXPERTS if (folder / name).is_dir()]
    if len(experts) == 1:
        (missing,) = set(EXPERTS) - {experts[0].name}
        raise FileNotFoundError(f"{folder} has {experts[0].name}, but no {missing}")
    if not experts:
        if not list(folder.glob("*.safetensors*")):
            raise FileNotFoundError(
                f"{folder} is no checkpoint: it has neither model_index.json (the Diffusers layout), nor "
                f"{' and '.join(EXPERTS)} or *.safetensors (the official one)"
            )
        experts = [folder]
    slots = dict(zip(("transformer", "transformer_2"), experts, strict=False))
    if list(folder.glob(_CLIP)):  # Wan 2.1 for images
        slots["image_encoder"] = _one(folder, _CLIP)
    return Files(
        **slots,
        vae=_one(folder, "*VAE.pth"),
        text_encoder=_one(folder, "models_t5*.pth"),
        tokenizer=_one(folder, TOKENIZER),
    )


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder} must hold one {pattern}; found: {names}")
    return found[0]


def load_components(
    files: Files, given: Mapping[str, Any], dtype: Dtypes, dequantize: bool, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Load a pipeline's components and choose the settings that belong to them.

    Args:
        files: where they are.
        given: components that are ready made or None, and settings; they come first.
        dtype: of all components, or by component; None: as they are stored.
        dequantize: whether to expand quantised weights.
        config: entries of the transformers' configuration that are known.

    Returns: the arguments of a pipeline's constructor.
    """

    def dtype_of(name: str) -> torch.dtype | None:
        return dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype

    def transformer(name: str, path: Path) -> Any:
        return WanTransformer3DModel.from_pretrained(
            path, dtype=dtype_of(name), dequantize=dequantize, **config
        )

    loaders: dict[str, Callable[[str, Path], Any]] = {
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": lambda name, path: AutoencoderKLWan.from_pretrained(path, dtype=dtype_of(name)),
        "text_encoder": lambda name, path: load_text_encoder(path, dtype_of(name), dequantize),
        "tokenizer": lambda name, path: load_tokenizer(path),
        "image_encoder": lambda name, path: load_image_encoder(path, dtype_of(name)),
    }
    parts = {name: None for name in loaders} | dict(given)
    wanted = {n: path for n, path in vars(files).items() if n not in given and path is not None}
    for name, path in (bar := progress_bar(wanted.items(), desc="loading", unit="component")):
        bar.set_postfix_str(name)
        parts[name] = loaders[name](name, path)
    if files.image_encoder is not None:
        parts.setdefault("image_processor", load_image_processor())
    models = [parts[name] for name in ("transformer", "transformer_2") if parts[name] is not None]
    if models:
        two = files.transformer_2 is not None or parts["transformer_2"] is not None
        config, preset = models[0].config, release_of(models[0].config, 1 + two)
        settings = {
            "boundary_ratio": preset.boundary_ratio if two else None,
            "expand_timesteps": has_timestep_per_token(config),
            "scheduler": FlowMatchUniPCScheduler(shift=preset.flow_shift),
        }
        parts = settings | parts
    return parts


def load_tokenizer(path: Path) -> Any:
    """Load umT5's tokenizer from its folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))  # which may be a repository's name, too


class FilesPipeline(HubPipeline):
    """Base of the pipelines: from_pretrained on the official layout, too, and from_single_file."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline from a folder or a hub repository, in the Diffusers or the official layout.

        Args:
            pretrained_model_name_or_path: folder, or repository such as "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
                or "Wan-AI/Wan2.2-T2V-A14B".
            **kwargs: any component, ready made, or None to leave it out. `dtype` (or `torch_dtype`): of all
                components, or a dict by component; default is the one each is stored in. The hub's options:
                `revision`, `cache_dir`, `token`, `local_files_only`. In the Diffusers layout also the others
                of diffusers' `DiffusionPipeline.from_pretrained`, such as `variant`, `device_map`,
                `quantization_config`.

        Returns: the pipeline.

        Raises:
            FileNotFoundError: there is no such folder, or something is missing in it.
            ValueError: it is a checkpoint for another pipeline, holds weights that have no place, or a
                setting or a combination of components is not supported.
        """
        source = str(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in OPTIONS & kwargs.keys()}
        folder = find_official(source, hub)
        if folder is None:
            return super().from_pretrained(source, **kwargs)
        task = official_task(folder)
        if task is not None and cls.__name__ not in (wanted := _TASKS.get(task, ())):
            advice = f"use {wanted[0]}" if wanted else f"{cls.__name__} does not run it"
            raise ValueError(f"{source} is a checkpoint for {task}; {advice}")
        if not Path(source).expanduser().is_dir():
            snapshot_download(source, allow_patterns=list(OFFICIAL_FILES), **hub)
        options = {name: value for name, value in kwargs.items() if name not in hub}
        pipe = cls._from_files(official_files(folder), options, source)
        pipe.register_to_config(_name_or_path=source)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        high: str | Path | None = None,
        low: str | Path | None = None,
        *,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        """Build a pipeline from single files, each of any format; see WanTransformer3DModel.from_single_file.

        Args:
            high: the high-noise expert's file, or that of the only transformer.
            low: the low-noise expert's file.
            vae: file, or model.
            text_encoder: file, or model; None if prompt_embeds are given at every call.
            tokenizer: folder or repository, such as "google/umt5-xxl"; or tokenizer.
            **options: `dtype`, for all components or a dict by component; default is the one each is stored
                in, bfloat16 for quantised weights. `dequantize`: whether to expand those. Further components
                and settings of the pipeline, such as `scheduler`, `boundary_ratio`, or `image_encoder` (file
                or model, Wan 2.1 for images); default are those of the released checkpoint with the same
                shapes. `attention_head_dim`, if it is not 128.

        Returns: the pipeline.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file cannot be read or is another model's, or the components do not belong together.
        """
        named = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        named |= {"transformer": high, "transformer_2": low}
        if "image_encoder" in options:  # of Wan 2.1; file, or model
            named["image_encoder"] = options.pop("image_encoder")
        paths = {
            name: Path(part).expanduser() for name, part in named.items() if isinstance(part, str | Path)
        }
        models = {name: part for name, part in named.items() if name not in paths and part is not None}
        place = ", ".join(str(path) for path in paths.values())
        return cls._from_files(Files(**paths), models | options, place)

    @classmethod
    def _from_files(cls, files: Files, options: dict[str, Any], place: str) -> Any:
        """Build a pipeline from components that are not in the Diffusers layout, of a place so called."""
        names = {name for names in cls._get_signature_keys(cls) for name in names}
        known = names | {"dtype", "torch_dtype", "dequantize", "attention_head_dim"}
        if unknown := sorted(options.keys() - known):
            raise ValueError(
                f"{', '.join(unknown)} cannot be used with official folders and single files, only with the "
                "Diffusers layout; save_pretrained writes that"
            )
        parts = load_components(
            files,
            {name: value for name, value in options.items() if name in names},
            options.get("dtype") or options.get("torch_dtype"),
            options.get("dequantize", False),
            {name: options[name] for name in ("attention_head_dim",) if name in options},
        )
        if parts["vae"] is None:
            raise ValueError("a pipeline needs a VAE; give vae=, a file or a model")
        pipe: Any = cls(**{name: part for name, part in parts.items() if name in names})
        loaded = {name: path for name, path in vars(files).items() if path is not None}
        pipe.came_from(place, {n: p for n, p in loaded.items() if not isinstance(options.get(n), nn.Module)})
        return pipe
