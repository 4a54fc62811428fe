"""Components in single files, each of any format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ...checkpoints.loading.image_encoder import load_image_encoder, load_image_processor
from ...checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ...checkpoints.loading.text_encoder import load_text_encoder
from ...presets import has_timestep_per_token, release_of
from ...private_apis import signature_keys
from ...schedulers import FlowMatchUniPCScheduler
from ...video.progress import progress_bar
from .checkpoint import TRANSFORMERS, Wanted

_CONFIG = ("attention_head_dim",)  # entries of the transformers' configuration that a caller may give


@dataclass(frozen=True)
class Files:
    """Paths of a pipeline's components.

    Args:
        transformer: file, or folder of shards, of the high-noise expert or the only transformer.
        transformer_2: the same of the low-noise expert.
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

    def of(self, wanted: Wanted) -> dict[str, Path]:
        """Return the paths of the components that are to be loaded."""
        return {n: path for n, path in vars(self).items() if path is not None and n not in wanted.given}


class SingleFiles:
    """A checkpoint whose components are files of any format.

    Args:
        files: their paths.
        source: what the caller calls the whole; default is the paths.
    """

    kind: str | None = None

    def __init__(self, files: Files, source: str | None = None) -> None:
        self.files = files
        self.source = source or ", ".join(str(path) for path in vars(files).values() if path is not None)

    def outline(self, wanted: Wanted) -> dict[str, nn.Module]:
        """Return the models on the meta device."""
        return {}

    def load(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Any:
        """Load the components, and choose the settings that belong to them.

        Raises:
            ValueError: an argument is for the Diffusers layout alone, or there is no VAE.
        """
        check_options(wanted)
        parts = load_components(self.files, wanted)
        if parts["vae"] is None:
            raise ValueError("a pipeline needs a VAE; give vae=, a file or a model")
        names = {name for names in signature_keys(pipeline) for name in names}
        pipe = pipeline(**{name: part for name, part in parts.items() if name in names})
        pipe.came_from(self.source, self.files.of(wanted))
        return pipe


def check_options(wanted: Wanted) -> None:
    """Refuse arguments that files without model_index.json have no use for.

    Raises:
        ValueError: there are any; they are named.
    """
    if unknown := sorted(wanted.others.keys() - set(_CONFIG)):
        raise ValueError(
            f"{', '.join(unknown)} cannot be used with official folders and single files, only with the "
            "Diffusers layout; save_pretrained writes that"
        )


def load_components(files: Files, wanted: Wanted) -> dict[str, Any]:
    """Load components, and choose the settings that belong to them; what the caller gives comes first."""

    def transformer(path: Path, name: str) -> nn.Module:
        return WanTransformer3DModel.from_pretrained(
            path, dtype=wanted.dtype_of(name), dequantize=wanted.dequantize, **wanted.others
        )

    loaders: dict[str, Callable[[Path, str], Any]] = {
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": lambda path, name: AutoencoderKLWan.from_pretrained(path, dtype=wanted.dtype_of(name)),
        "text_encoder": lambda path, name: load_text_encoder(path, wanted.dtype_of(name), wanted.dequantize),
        "tokenizer": lambda path, name: load_tokenizer(path),
        "image_encoder": lambda path, name: load_image_encoder(path, wanted.dtype_of(name)),
    }
    parts = {name: None for name in loaders} | dict(wanted.given)
    for name, path in (bar := progress_bar(files.of(wanted).items(), desc="loading", unit="component")):
        bar.set_postfix_str(name)
        parts[name] = loaders[name](path, name)
    if files.image_encoder is not None:
        parts.setdefault("image_processor", load_image_processor())
    two = files.transformer_2 is not None or parts["transformer_2"] is not None
    models = [parts[name] for name in TRANSFORMERS if parts[name] is not None]
    return (settings_of(models[0].config, two) if models else {}) | parts


def settings_of(config: Any, two: bool) -> dict[str, Any]:
    """Return a pipeline's settings and scheduler as in the release with such transformers, or the closest.

    Args:
        config: the configuration of a transformer.
        two: whether the checkpoint has two of them.
    """
    preset = release_of(config, 1 + two)
    return {
        "boundary_ratio": preset.boundary_ratio if two else None,
        "expand_timesteps": has_timestep_per_token(config),
        "scheduler": FlowMatchUniPCScheduler(shift=preset.flow_shift),
    }


def load_tokenizer(path: Path) -> Any:
    """Load umT5's tokenizer from its folder, or a repository of this name."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))
