"""What every checkpoint offers, whatever its layout, and what a caller wants of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from ...accel.planning.meta_models import MODELS
from ...checkpoints.files.hub import OPTIONS
from ...checkpoints.loading.dtypes import read_dtype
from ...checkpoints.loading.stored import StoredModel
from ...checks import as_path, check_choice, shown
from ...private_apis import signature_keys

Dtype = torch.dtype | str | None
Dtypes = Dtype | Mapping[str, Dtype]
TRANSFORMERS = ("transformer", "transformer_2")
PREPARED = (*TRANSFORMERS, "text_encoder")  # what is large enough to be prepared
# The models of a pipeline, and what kind of model each is.
KINDS = {name: name for name in MODELS} | dict.fromkeys(TRANSFORMERS, "transformer")


@dataclass(frozen=True)
class Wanted:
    """What a caller wants of a checkpoint."""

    # Components that are ready made, or None to leave one out, and settings of the pipeline.
    given: Mapping[str, Any] = field(default_factory=dict)
    # One for all components, or by component and "default"; None, there too: as stored.
    dtype: torch.dtype | Mapping[str, torch.dtype | None] | None = None
    dequantize: bool = False  # whether to expand weights that are stored quantised
    fp8: tuple[str, ...] = ()  # the transformers that are to be in float8
    later: torch.dtype | None = None  # dtype that the transformers get after loading, part by part
    others: Mapping[str, Any] = field(default_factory=dict)  # what only some layouts know

    @classmethod
    def of(
        cls, pipeline: type[DiffusionPipeline], dtype: Dtypes, dequantize: bool, options: Mapping[str, Any]
    ) -> "Wanted":
        """Sort the further arguments of a pipeline's constructor, without those of a download.

        `dtype` comes before `torch_dtype` in `options`; a ValueError says what is wrong with it.
        """
        names = {name for names in signature_keys(pipeline) for name in names}
        given = {name: value for name, value in options.items() if name in names}
        others = {n: v for n, v in options.items() if n not in names | OPTIONS | {"torch_dtype"}}
        asked = options.get("torch_dtype") if dtype is None else dtype
        components = signature_keys(pipeline)[0]
        return cls(given, _read_dtypes(asked, components), dequantize, others=others)

    def dtype_of(self, name: str) -> torch.dtype | None:
        """Return the dtype asked for a component; None: as stored."""
        if isinstance(self.dtype, Mapping):
            return self.dtype.get(name, self.dtype.get("default"))
        return self.dtype


def _read_dtypes(asked: Dtypes, components: Iterable[str]) -> Any:
    if not isinstance(asked, Mapping):
        return read_dtype(asked)
    for name in asked:
        check_choice("a key of dtype", name, (*components, "default"))
    return {name: read_dtype(dtype, f"dtype[{shown(name)}]") for name, dtype in asked.items()}


# A checkpoint's models by component name, on the meta device, in their sizes and dtypes.
Outline = dict[str, Any]


class Checkpoint(Protocol):
    """A checkpoint in one of the layouts."""

    source: str  # the folder, repository or files, as the caller gave them
    kind: str | None  # what it is for, in the words of the layout's configuration; None if nothing says so
    downloads: list[str]  # patterns of a repository's files that a load needs

    def outline(self, wanted: Wanted) -> Outline:
        """Return the models without reading weights; of a repository that is not here, those it describes."""

    def fetch(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> dict[str, StoredModel]:
        """Return the models that can be prepared, by component; a repository is downloaded first."""

    def load(self, pipeline: type[DiffusionPipeline], wanted: Wanted) -> Any:
        """Load a pipeline of this class; a repository is downloaded first."""


def is_folder(source: str) -> bool:
    """Return whether a source is a folder here, and not a repository's name."""
    return as_path(source).is_dir()
