"""A model in a weight file: its names, configuration and dtypes, known before any weight is read."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.damage import errors_named
from ..files.quantized import QuantizedTensor, on_meta, unflattened
from ..files.weights import WeightFile, read_weights
from ..naming.configs import Shapes
from ..naming.dialects import Tensors, normalize, part_of, stripped
from ..naming.keys import KeyTable
from ..naming.names import own_names, shapes_of
from ..naming.schemas import Schema
from .fill import bytes_to_convert, fill
from .values import check_samples

Config = dict[str, Any]


class ModelFormat(ABC):
    """How one kind of model is stored: the names of its tensors, its configuration, how it is built."""

    kind: str  # "transformer", "vae", "text_encoder" or "image_encoder"
    noun = "this model"  # in errors
    schema: Schema  # what a configuration of it may say
    unused: tuple[str, ...] = ()  # how names begin that files hold and the model has no parameter for

    @abstractmethod
    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        """Return the tables from names in files to the model's own, the official one first."""

    @abstractmethod
    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config:
        """Return the configuration for these shapes; a ValueError says that they are another model's.

        `given` is the config.json beside the weights, ignored if it is another model's; `known` are entries
        that the caller gives; `source` is the file, for errors.
        """

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """Return the model on the meta device."""

    @abstractmethod
    def settings(self, config: Config) -> Config:
        """Return config.json of the Diffusers layout."""

    def prepare(self, source: str, tensors: Tensors) -> Tensors:
        """Return tensors in the shapes of the model's parameters."""
        return tensors

    def names(self, source: str, names: Iterable[str]) -> dict[str, str]:
        """Return the file's name of each of the model's own; a ValueError lists names that no table has."""
        return own_names(source, names, self.tables(names), self.noun)

    def check(self, source: str, tensors: Tensors) -> None:
        """Refuse values that cannot be meant, by a ValueError; weights are read for it."""
        return None  # most kinds have none that can be told

    def in_float32(self, model: nn.Module, dtype: torch.dtype | None) -> Iterable[str]:
        """Return the names of modules and parameters that are float32 in a half-precision model."""
        return ()

    def body(self, model: nn.Module) -> nn.Module:
        """Return the part of the model that the tensors' names start at."""
        return model

    def finished(self, model: nn.Module) -> nn.Module:
        """Return a filled model with what is no weight of a file."""
        return model


@dataclass(frozen=True)
class StoredModel:
    """A model in a file or folder, recognised; its weights are memory-mapped and not yet read."""

    format: ModelFormat
    source: str  # file or folder
    tensors: Tensors  # by the model's own names
    origins: Mapping[str, str]  # names in the file, by the model's own
    config: Config  # what format.build takes
    paths: tuple[Path, ...] = ()  # the files that hold the tensors

    @property
    def kind(self) -> str:
        """One of "transformer", "vae", "text_encoder" and "image_encoder"."""
        return self.format.kind

    @cached_property
    def official_names(self) -> dict[str, str]:
        """The official name of each tensor that has one, by the model's own."""
        table = self.format.tables(self.tensors)[0].inverse
        return {own: name for own in self.tensors if (name := table.rename(own)) is not None}

    @property
    def sizes(self) -> Counter[str]:
        """Bytes of the file's weights by their dtype, or "quantised"."""
        sizes: Counter[str] = Counter()
        for name in self.official_names:
            tensor = self.tensors[name]
            if isinstance(tensor, QuantizedTensor):
                sizes["quantised"] += tensor.nbytes
            else:
                sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return sizes

    def bytes_to_convert(self, dtype: torch.dtype | None, dequantize: bool = False) -> int:
        """Return the bytes in the file that `load` reads and copies, where others stay memory-mapped."""
        return sum(bytes_to_convert(tensor, dtype, dequantize) for tensor in self.tensors.values())

    @cached_property
    def settings(self) -> Config:
        """config.json of the Diffusers layout."""
        return self.format.settings(self.config)

    def meta_model(self, dtype: torch.dtype | None = None, dequantize: bool = False) -> Any:
        """Return the model on the meta device, in the dtypes that `load` would give; no weights are read."""
        return self._filled({name: on_meta(t) for name, t in self.tensors.items()}, dtype, dequantize)

    def load(self, dtype: torch.dtype | None = None, dequantize: bool = False, check: bool = True) -> Any:
        """Return the model with its weights, in evaluation mode.

        Args:
            dtype: dtype of the parameters; None: as they are stored, bfloat16 for those that were quantised.
            dequantize: whether to expand quantised weights, which stay quantised otherwise.
            check: whether to read weights that may hold values that cannot be meant.
        """
        if check:
            self.check()
        return self._filled(self.tensors, dtype, dequantize)

    def check(self) -> None:
        """Refuse values that cannot be meant, by a ValueError; weights are read for it."""
        check_samples(self.source, self.tensors)
        self.format.check(self.source, self.tensors)

    def _filled(self, tensors: Tensors, dtype: torch.dtype | None, dequantize: bool) -> nn.Module:
        with errors_named(self.source):
            model = self.format.build(self.config)
        in_float32 = self.format.in_float32(model, dtype)
        fill(self.format.body(model), self.source, tensors, dtype, dequantize, in_float32)
        return self.format.finished(model).eval()


def read_as(
    format: ModelFormat, file: WeightFile | Path, given: Config | None = None, known: Config | None = None
) -> StoredModel:
    """Read a file as a model of a known kind; see `ModelFormat.config` for the arguments.

    A missing file or shard is a FileNotFoundError, another model or a weight without a place a ValueError.
    """
    file = read_weights(file.expanduser()) if isinstance(file, Path) else file
    file = part_of(file, format.kind)
    plain = stripped(file.tensors)
    used = {key: t for key, t in file.tensors.items() if not plain[key].startswith(format.unused)}
    tensors = format.prepare(file.source, normalize(replace(file, tensors=used)))
    names, keys = format.names(file.source, tensors), {name: key for key, name in stripped(used).items()}
    own = {name: tensors[theirs] for name, theirs in names.items()}
    origins = {name: keys.get(theirs, theirs) for name, theirs in names.items()}
    config = format.config(file.source, shapes_of(own), given or {}, known or {})
    format.schema.check(file.source, config)
    if file.flat:
        shapes = shapes_of(format.body(format.build(config)).state_dict())
        own = {name: unflattened(tensor, shapes.get(name)) for name, tensor in own.items()}
    return StoredModel(format, file.source, own, origins, config, file.paths)
