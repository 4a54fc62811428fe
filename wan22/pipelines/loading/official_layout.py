"""The official layout: a folder for each expert, or none, and .pth files beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from ...accel.planning.meta_models import released_models, store_as
from ...checkpoints.files.hub import EXPERTS, TOKENIZERS
from ...checkpoints.loading.stored import StoredModel
from ...checkpoints.naming.schemas import read_config
from ...downloads import reaching
from ...presets import Preset, find_preset
from .checkpoint import TRANSFORMERS, Outline, Wanted, is_folder
from .single_files import SingleFiles, check_options

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
    """A checkpoint in the official layout: a folder, or a repository whose configurations are in `folder`."""

    def __init__(self, source: str, folder: Path, hub: Mapping[str, Any]) -> None:
        self.source, self.folder, self.hub = source, folder, hub
        self.downloads = list(FILES)
        self.configs = [read_config(path) for path in config_files(folder)]
        self.kind = next((config.get("model_type") for config in self.configs), None)

    def outline(self, wanted: Wanted) -> Outline:
        """Return the models that would be loaded; of a repository that is not here, those of its release."""
        try:
            return self._files().outline(wanted)
        except FileNotFoundError:
            if is_folder(self.source):
                raise
        preset = self._preset()
        return {} if preset is None else outline_of(preset, wanted)

    def fetch(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> dict[str, StoredModel]:
        """Return the models that can be prepared, by component; a repository is downloaded first."""
        self._download()
        return self._files().fetch(pipeline, wanted)

    def load(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Any:
        """Load a pipeline of this class; a repository is downloaded first."""
        check_options(wanted)
        self._download()
        pipe = self._files().load(pipeline, wanted)
        pipe.register_to_config(_name_or_path=self.source)
        return pipe

    def _download(self) -> None:
        if not is_folder(self.source):
            with reaching(self.source, options=self.hub):
                snapshot_download(self.source, allow_patterns=self.downloads, **self.hub)

    def _files(self) -> SingleFiles:
        return SingleFiles(official_files(self.folder), self.source)

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


def outline_of(preset: Preset, wanted: Wanted) -> Outline:
    """Return the models of a release's repository, without reading any of it."""
    outline: Outline = {}
    for name, model in released_models(preset).items():
        if name not in wanted.given:
            # All released repositories are so.
            stored = torch.bfloat16 if name == "text_encoder" else torch.float32
            store_as(model, wanted.dtype_of(name) or stored, stored)
            outline[name] = model
    return outline


def config_files(folder: Path) -> list[Path]:
    """Return the transformers' config.json files in a folder of the official layout."""
    return [folder / name for name in CONFIGS if (folder / name).is_file()]


def official_files(folder: Path) -> dict[str, Path]:
    """Return the components in a folder; a FileNotFoundError names what is missing."""
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
    patterns = {"vae": "*VAE.pth", "text_encoder": "models_t5*.pth", "tokenizer": TOKENIZER}
    if list(folder.glob(_CLIP)):  # Wan 2.1 for images
        patterns["image_encoder"] = _CLIP
    return {
        **dict(zip(TRANSFORMERS, experts, strict=False)),
        **{name: _one(folder, pattern) for name, pattern in patterns.items()},
    }


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder} must hold one {pattern}; found: {names}")
    return found[0]
