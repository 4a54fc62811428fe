"""The official layout: a folder for each expert, or none, and .pth files beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from ...accel.planning.meta_models import released_models
from ...checkpoints.files.hub import EXPERTS, TOKENIZERS
from ...presets import Preset, find_preset
from .checkpoint import TRANSFORMERS, Wanted, is_folder
from .single_files import Files, SingleFiles, check_options

TOKENIZER = TOKENIZERS[0]
_CLIP = "models_clip*.pth"
CONFIGS = ("config.json", *(f"{folder}/config.json" for folder in EXPERTS))
# What an official repository holds, and no more of it than is read.
FILES = (
    *CONFIGS,
    *("*.safetensors", "*.safetensors.index.json"),  # in any folder
    *("models_t5*.pth", "*VAE.pth", _CLIP, f"{TOKENIZER}/*"),
)


class OfficialLayout:
    """A checkpoint in the official layout.

    Args:
        source: folder or repository.
        folder: where its configurations are.
        hub: options of the download.
    """

    def __init__(self, source: str, folder: Path, hub: Mapping[str, Any]) -> None:
        self.source, self.folder, self.hub = source, folder, hub
        self.configs = [json.loads(path.read_text()) for path in config_files(folder)]
        self.kind = next((config.get("model_type") for config in self.configs), None)

    def outline(self, wanted: Wanted) -> dict[str, nn.Module]:
        """Return the models of the release that the configurations belong to, on the meta device."""
        preset = self._preset()
        return {} if preset is None else released_models(preset)

    def load(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Any:
        """Load a pipeline of this class; a repository is downloaded first.

        Raises:
            FileNotFoundError: the folder is no checkpoint, or something is missing; it is named.
            ValueError: an argument is for the Diffusers layout alone.
        """
        check_options(wanted)
        if not is_folder(self.source):
            snapshot_download(self.source, allow_patterns=list(FILES), **self.hub)
        pipe = SingleFiles(official_files(self.folder), self.source).load(pipeline, wanted)
        pipe.register_to_config(_name_or_path=self.source)
        return pipe

    def _preset(self) -> Preset | None:
        known = [config for config in self.configs if {"dim", "in_dim"} <= config.keys()]
        if not known:
            return None
        preset = find_preset(
            dim=known[0]["dim"],
            in_channels=known[0]["in_dim"],
            experts=min(len(known), 2),
            two_frames=known[0].get("model_type") == "flf2v",
        )
        return preset if preset is not None and preset.repo else None


def config_files(folder: Path) -> list[Path]:
    """Return the transformers' config.json files in a folder of the official layout."""
    return [folder / name for name in CONFIGS if (folder / name).is_file()]


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
    return Files(
        **dict(zip(TRANSFORMERS, experts, strict=False)),
        vae=_one(folder, "*VAE.pth"),
        text_encoder=_one(folder, "models_t5*.pth"),
        tokenizer=_one(folder, TOKENIZER),
        image_encoder=_one(folder, _CLIP) if list(folder.glob(_CLIP)) else None,  # Wan 2.1 for images
    )


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder} must hold one {pattern}; found: {names}")
    return found[0]
