"""Plan a conversion: the files of a layout, and the tensors of the source in each."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ...checks import cut, listed
from ...presets import release_of
from ..files.hub import EXPERTS, TOKENIZERS
from ..files.quantized import QuantizedTensor, expanded
from ..files.weights import as_json
from ..loading.stored import StoredModel
from .settings import (
    diffusers_config,
    lost_schedule,
    lost_settings,
    model_index,
    official_config,
    scheduler_config,
)
from .source import Source
from .unfinished import Unfinished

logger = logging.getLogger(__name__)

PIECE = 2**24  # values that are converted at a time, so that memory holds no whole tensor twice

LAYOUTS = ("diffusers", "official", "single-file")
# Official names of the files that are not in folders of their own; a VAE's depends on whether it is residual.
_VAES = {False: "Wan2.1_VAE.pth", True: "Wan2.2_VAE.pth"}
_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
_NEEDED = {
    "transformer": "a transformer",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
    "tokenizer": f"a tokenizer's folder, {' or '.join(TOKENIZERS)}",
}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    component: str  # of the pipeline
    name: str  # in the model
    origin: str  # name in the source
    key: str  # name in the file to be written
    tensor: torch.Tensor | QuantizedTensor  # as the source has it
    dtype: torch.dtype  # to be written

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file to be written."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def values(self) -> torch.Tensor:
        """Return the values to be written; a ValueError says if they are larger than float16 can be."""
        return self._converted(expanded(self.tensor)).contiguous()

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yield the same values a piece at a time; quantised tensors are expanded whole."""
        for piece in expanded(self.tensor).reshape(-1).split(PIECE):
            yield self._converted(piece)

    def _converted(self, values: torch.Tensor) -> torch.Tensor:
        result = values.to(self.dtype)
        if self.dtype == torch.float16 and (lost := result.isinf() & values.isfinite()).any():
            largest = values[lost].abs().max().item()
            raise ValueError(f"{self.origin} holds {largest:g}, float16 ends at 65504; bf16 can hold it")
        return result


@dataclass(frozen=True)
class OutputFile:
    """A weight file to be written."""

    path: str  # inside the destination, .safetensors or .pth
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion writes, by path inside the destination."""

    files: list[OutputFile] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # JSON files
    copies: dict[str, Path] = field(default_factory=dict)  # folders that are copied unchanged

    def add(self, path: str, tensors: Sequence[OutputTensor], limit: int | None) -> None:
        """Add a model's weights, in files of at most `limit` bytes, with an index if they are several."""
        files = list(_shards(path, tensors, limit))
        self.files.extend(files)
        if len(files) > 1:
            places = {tensor.key: Path(file.path).name for file in files for tensor in file.tensors}
            total = sum(file.nbytes for file in files)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            self.texts[f"{path}.index.json"] = as_json(index)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def copied(self) -> dict[str, Path]:
        """Each file that is copied, by path inside the destination."""
        return {
            str(Path(path, file.relative_to(folder))): file
            for path, folder in self.copies.items()
            for file in _files_in(folder)
        }

    @property
    def paths(self) -> set[str]:
        """Where everything is written, inside the destination."""
        return {*self.texts, *self.copied, *(file.path for file in self.files)}

    @property
    def nbytes_beside(self) -> int:
        """Bytes of what is written beside the weights."""
        copied = sum(path.stat().st_size for path in self.copied.values())
        return copied + sum(len(text.encode()) for text in self.texts.values())

    def missing(self, unfinished: Unfinished) -> list[OutputFile]:
        """Return the weight files that are not finished yet."""
        return [file for file in self.files if not unfinished.has(file.path)]

    def describe(self) -> Iterable[str]:
        """Yield a line for each tensor, file and folder, and one for the sum."""
        for file in self.files:
            for tensor in file.tensors:
                dtype, shape = str(tensor.dtype).removeprefix("torch."), "×".join(map(str, tensor.shape))
                yield f"{tensor.origin} → {tensor.key}  {dtype}  {shape}  {file.path}"
        for path in self.texts:
            yield f"settings → {path}"
        for path, folder in self.copies.items():
            yield f"{folder} → {path}"
        tensors, size = sum(len(f.tensors) for f in self.files), sum(f.nbytes for f in self.files)
        yield f"{tensors} tensors, {size / 1e9:.3g} GB, in {len(self.files)} files"


def make_plan(source: Source, to: str, name: str, dtype: torch.dtype | None, shard_size: int) -> Plan:
    """Return what has to be written.

    `name` is the name of a single model's single file; `dtype` None keeps the stored ones, bfloat16 for
    quantised tensors; `shard_size` is in bytes, where the layout `to` has shards. A component that the source
    lacks is a FileNotFoundError, one that the layout has no place for a ValueError.
    """
    plan = Plan()
    if "image_encoder" in source.models:
        raise ValueError(
            f"{source.path} holds an image encoder, which is not converted; leave it in its file"
        )
    for component, model in source.models.items():
        path = _path_of(component, model, to, source, name)
        tensors = [
            OutputTensor(
                component,
                own,
                model.origins[own],
                own if to == "diffusers" else official,
                tensor := model.tensors[own],
                dtype or (torch.bfloat16 if isinstance(tensor, QuantizedTensor) else tensor.dtype),
            )
            for own, official in model.official_names.items()
        ]
        sharded = to != "single-file" and path.endswith(".safetensors")
        plan.add(path, tensors, shard_size if sharded else None)
        config = str(Path(path).with_name("config.json"))
        if to == "diffusers":
            sizes: Counter[torch.dtype] = Counter()
            for output in tensors:
                sizes[output.dtype] += output.nbytes
            plan.texts[config] = as_json(diffusers_config(model, sizes.most_common(1)[0][0]))
            continue
        if to == "official" and model.kind == "transformer":
            plan.texts[config] = as_json(official_config(model.settings))
        if lost := lost_settings(model, to):
            message = "%s: the %s layout does not keep %s; who loads it must give them"
            logger.warning(message, model.source, to, ", ".join(lost))
    if source.whole:
        _plan_repository(plan, source, to)
    return plan


def _path_of(component: str, model: StoredModel, to: str, source: Source, name: str) -> str:
    """Return where a model's weights go, not yet divided into shards."""
    expert = EXPERTS[component == "transformer_2"] if "transformer_2" in source.models else None
    if to == "single-file":
        own = expert if expert and model.kind == "transformer" else component
        return f"{own}.safetensors" if source.whole else name
    if to == "official" and model.kind == "vae":
        return _VAES[model.settings["is_residual"]]
    if to == "official" and model.kind == "text_encoder":
        return _TEXT_ENCODER
    folder = component if to == "diffusers" else expert or ""
    file = "model" if model.kind == "text_encoder" else "diffusion_pytorch_model"
    return str(Path(folder if source.whole else "", f"{file}.safetensors"))


def _files_in(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield all files in a folder, following links; a ValueError names one that leads round in a circle."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif path.resolve() in above:
            raise ValueError(f"{cut(path)} is a link to a folder that it lies in; remove the link")
        else:
            yield from _files_in(path, above)


def _shards(path: str, tensors: Sequence[OutputTensor], limit: int | None) -> Iterable[OutputFile]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    stem = path.removesuffix(".safetensors")
    for i, shard in enumerate(shards, 1):
        several = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        yield OutputFile(path if len(shards) == 1 else several, tuple(shard))


def _plan_repository(plan: Plan, source: Source, to: str) -> None:
    """Add what a repository has beside its models' weights."""
    found = source.models.keys() | ({"tokenizer"} if source.tokenizer else set())
    complete = to == "single-file" or (to == "diffusers" and source.index is not None)
    if not complete and (missing := [what for part, what in _NEEDED.items() if part not in found]):
        raise FileNotFoundError(
            f"{source.path} lacks {' and '.join(missing)}; put it there, or convert each file by itself"
        )
    if source.tokenizer is not None:
        plan.copies[TOKENIZERS[0] if to == "official" else "tokenizer"] = source.tokenizer
    if to == "diffusers" and source.index is not None:  # whose settings are kept
        plan.copies.update(source.folders)
        plan.texts["model_index.json"] = as_json(source.index)
        return
    if others := source.folders.keys() - {"scheduler"}:
        raise ValueError(
            f"{source.path} has {listed(others)}, for which the {to} layout has no name; convert "
            "the folders of the other components one by one, or the whole to diffusers"
        )
    if "transformer" not in source.models:
        return
    experts = 1 + ("transformer_2" in source.models)
    release = release_of(source.models["transformer"].settings, experts)
    if to == "diffusers":
        plan.texts["scheduler/scheduler_config.json"] = scheduler_config(release.flow_shift)
        plan.texts["model_index.json"] = as_json(model_index(source, release))
    for name, value, official in lost_schedule(source, release):
        message = "%s: the %s layout does not keep %s %s; loaders take %s's %s"
        logger.warning(message, source.path, to, name, value, release.name, official)
