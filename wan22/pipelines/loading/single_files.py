"""Components in single files, each of any format."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from ...checkpoints.files.damage import errors_named
from ...checkpoints.files.hub import check_repository_name, local_file
from ...checkpoints.files.weights import read_weights
from ...checkpoints.loading.encoders import TOKENIZER, load_image_processor
from ...checkpoints.loading.models import WanTransformer3DModel
from ...checkpoints.loading.recognize import kinds_in, read_model
from ...checkpoints.loading.single_file import NO_REFERENCE, Arguments, Reference
from ...checkpoints.loading.stored import StoredModel
from ...checks import as_path
from ...downloads import reaching
from ...presets import has_timestep_per_token, release_of
from ...private_apis import signature_keys
from ...schedulers import FlowMatchUniPCScheduler
from . import preparing
from .checkpoint import KINDS, PREPARED, TRANSFORMERS, Outline, Wanted

VOCABULARIES = ("tokenizer.json", "spiece.model")  # files of which a tokenizer's folder has one
_HEAD_DIM = "attention_head_dim"  # which no file says; a caller may


class SingleFiles:
    """A checkpoint of single files in any format, folders of shards, and the tokenizer's folder."""

    kind: str | None = None
    downloads: list[str] = []

    def __init__(
        self, paths: Mapping[str, Path], source: str | None = None, reference: Reference = NO_REFERENCE
    ) -> None:
        self.paths, self.reference = paths, reference  # what the transformers' configurations must agree with
        places = dict.fromkeys(map(str, paths.values()))  # one may hold several
        self.sources = [source] if source else [*places]
        self.source = ", ".join(self.sources)

    def outline(self, wanted: Wanted) -> Outline:
        """Return the models that would be loaded, without reading weights."""
        models = self._stored_models(wanted)
        prepared = preparing.find_all(models, wanted)
        return {
            name: stored.meta_model(None if name in prepared else wanted.dtype_of(name), wanted.dequantize)
            for name, stored in (models | prepared).items()
        }

    def fetch(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> dict[str, StoredModel]:
        """Return the models that can be prepared, by component."""
        return {n: stored for n, stored in self._stored_models(wanted).items() if n in PREPARED}

    def load(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Any:
        """Load the components, and choose the settings that belong to them; what is given comes first."""
        check_options(wanted)
        paths = {name: path for name, path in self.paths.items() if name not in wanted.given}
        parts: dict[str, Any] = dict.fromkeys((*KINDS, "tokenizer")) | dict(wanted.given)
        if "tokenizer" in paths:
            parts["tokenizer"] = load_tokenizer(paths["tokenizer"])
        stored = self._stored_models(wanted)
        prepared = preparing.find_all(stored, wanted)
        preparing.report(self.source, stored, prepared, wanted)
        left = {name: model for name, model in stored.items() if name not in prepared}
        parts |= preparing.load_all(left, wanted) | preparing.load_prepared(prepared)
        if parts["vae"] is None and "vae" not in wanted.given:
            raise ValueError("a pipeline needs a VAE; give vae=, a file or a model")
        if "image_encoder" in self.paths:
            parts.setdefault("image_processor", load_image_processor())
        models = [parts[name] for name in TRANSFORMERS if parts[name] is not None]
        if models:
            two = "transformer_2" in self.paths or parts["transformer_2"] is not None
            parts = settings_of(models[0].config, two) | parts
        parts.setdefault("scheduler", None)
        names = {name for names in signature_keys(pipeline) for name in names}
        pipe = pipeline(**{name: part for name, part in parts.items() if name in names})
        pipe.provenance.record_source(self.sources, paths)
        return pipe

    def _stored_models(self, wanted: Wanted) -> dict[str, StoredModel]:
        """Return the models that are in the files, and not given."""
        names = [name for name in self.paths if name in KINDS and name not in wanted.given]
        return {name: self._stored(name, wanted) for name in names}

    def _stored(self, name: str, wanted: Wanted) -> StoredModel:
        kind, head_dim = KINDS[name], wanted.others.get(_HEAD_DIM)
        head_dim = head_dim or self.reference.entries.get(_HEAD_DIM)
        stored = read_model(self.paths[name], kind, head_dim=head_dim)
        return (
            self.reference.agreed(stored, WanTransformer3DModel.__name__) if kind == "transformer" else stored
        )


def check_options(wanted: Wanted) -> None:
    """Refuse arguments that files without model_index.json have no use for."""
    if unknown := sorted(wanted.others.keys() - {_HEAD_DIM}):
        raise ValueError(
            f"{', '.join(unknown)} cannot be used with official folders and single files, only with the "
            "Diffusers layout; save_pretrained writes that"
        )


def settings_of(config: Any, two: bool) -> dict[str, Any]:
    """Return the settings and scheduler of the release with one or two such transformers, or the closest."""
    preset = release_of(config, 1 + two)
    return {
        "boundary_ratio": preset.boundary_ratio if two else None,
        "expand_timesteps": has_timestep_per_token(config),
        "scheduler": FlowMatchUniPCScheduler(shift=preset.flow_shift),
    }


def path_of(name: str, source: str | Path, given: Arguments) -> Path:
    """Return where a component's file is here, after its download if it is an address on the hub."""
    if name == "tokenizer":  # a folder here, or a repository, which its loader knows
        return as_path(source)
    return local_file(source, **given.access)


def with_parts_of(path: Path, paths: Mapping[str, Path], components: Iterable[str]) -> dict[str, Path]:
    """Return the components' files, with those that are in the transformer's file and given nowhere else."""
    found = {kind: path for kind in kinds_in(path) if kind in components}
    if "text_encoder" in found and tokenizer_in(path) is not None:
        found["tokenizer"] = path
    return found | dict(paths)


def load_tokenizer(path: Path) -> Any:
    """Load umT5's tokenizer from its folder, a repository, or a weight file that has it inside."""
    from transformers import AutoTokenizer, T5Tokenizer

    if not path.exists():
        check_repository_name(str(path))
        with reaching(str(path)):
            path = Path(snapshot_download(str(path), allow_patterns=["*.json", *VOCABULARIES]))
    if not path.is_file():
        if not any((path / name).is_file() for name in VOCABULARIES):
            raise FileNotFoundError(f"{path} has no vocabulary; it must hold {' or '.join(VOCABULARIES)}")
        with errors_named(path):
            return AutoTokenizer.from_pretrained(str(path))
    model = tokenizer_in(path)
    if model is None:
        raise ValueError(f"{path} holds no tokenizer; give its folder, or google/umt5-xxl")
    with TemporaryDirectory() as folder:
        Path(folder, "spiece.model").write_bytes(model)
        return T5Tokenizer.from_pretrained(folder)


def tokenizer_in(path: Path) -> bytes | None:
    """Return sentencepiece's model, which ComfyUI keeps beside umT5's weights; None if there is none."""
    tensors = read_weights(path).tensors
    found = [tensor for name, tensor in tensors.items() if name.split(".")[-1] == TOKENIZER]
    return found[0].numpy().tobytes() if found and isinstance(found[0], torch.Tensor) else None
