"""Convert models once into the cache, so that later loads map them from their files.

Weights are written as a load would have them in memory: bfloat16, float32 where the model keeps it, and in
the form "fp8" the linear layers of a transformer's blocks in float8 with a scale per output. Nothing is
deleted.

Shapes: o outputs, i inputs.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checks import check_choice
from ...host_memory import trim_heap
from ...whole_files import whole_file
from ..converting.plan import OutputTensor, Plan
from ..converting.settings import diffusers_config
from ..converting.unfinished import Unfinished
from ..converting.writing import bytes_to_write, check_room, write_plan
from ..files.quantized import ROWS, QuantizedTensor, scaled_numbers
from ..files.weights import as_json
from ..loading.stored import StoredModel
from .cache import FORMS, RECORD, cache_folder, find_prepared, folder_of, is_preparable

logger = logging.getLogger(__name__)

SHARD_SIZE = 5 * 10**9  # what an interruption costs at most
ELSEWHERE = "; the environment variable WAN22_CACHE can name a folder on another disk"
_FLOAT8 = torch.float8_e4m3fn
_NAMES = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass(frozen=True)
class Preparation:
    """A model to be prepared, or that is already."""

    name: str  # of the component
    stored: StoredModel
    form: str
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it is there."""
        return find_prepared(self.stored, self.form) is not None

    @cached_property
    def plan(self) -> Plan:
        """What is to be written."""
        plan, path = Plan(), f"{_NAMES[self.stored.kind]}.safetensors"
        plan.add(path, list(_tensors(self.name, self.stored, self.form)), SHARD_SIZE)
        plan.texts["config.json"] = as_json(diffusers_config(self.stored, torch.bfloat16))
        return plan

    @property
    def unfinished(self) -> Unfinished:
        """What it is written in. Other processes, such as the ranks of one run, wait, and find it made."""
        return Unfinished(self.folder, {"model": self.folder.name}, waits=True)

    @property
    def nbytes_left(self) -> int:
        """Bytes that are not on the disk yet."""
        return 0 if self.done else bytes_to_write(self.plan.missing(self.unfinished))


def preparations(models: Mapping[str, StoredModel], form: str) -> list[Preparation]:
    """Return what preparing models of a pipeline, by component, writes; those without need are left out.

    A text encoder in the form "fp8" is prepared in bfloat16. Two components of one file are one preparation.
    """
    check_choice("prepare", form, FORMS)
    found: dict[Path, Preparation] = {}
    for name, stored in models.items():
        own = form if stored.kind == "transformer" else "bf16"
        if is_preparable(stored, own):
            folder = folder_of(stored, own)
            found.setdefault(folder, Preparation(name, stored, own, folder))
    return list(found.values())


def prepare(work: Sequence[Preparation], progress: bool | None = None) -> None:
    """Write what is not there yet, model by model; what an interrupted call has finished stays.

    `progress` None shows a bar in terminals and notebooks. An OSError says before anything is written that
    the disk has not enough room for all.
    """
    need = sum(part.nbytes_left for part in work)
    check_room(cache_folder(), need, ELSEWHERE)
    for part in work:
        if not part.done or part.unfinished.journal.exists():
            _prepare_one(part, {} if progress is None else {"disable": not progress})


def _prepare_one(part: Preparation, options: Mapping[str, Any]) -> None:
    with part.unfinished as unfinished:
        if part.done:
            if unfinished.placed:  # by a call that ended before it could say so
                unfinished.clear()
            return
        if part.folder.exists():
            raise FileExistsError(f"{part.folder} is damaged; delete it, and prepare again")
        part.stored.check()
        write_plan(part.plan, unfinished, f"preparing {part.name}", beside=[RECORD], **options)
        folder = unfinished.folder
        sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.*")) if path.name != RECORD}
        record = {"source": [str(path) for path in part.stored.paths], "form": part.form}
        with whole_file(folder / RECORD) as temporary:
            temporary.write_text(as_json({**record, "files": sizes}))
        unfinished.place()
    trim_heap()  # what a layer's rounding took does not stay the process's
    logger.info("%s is prepared in %s", part.name, part.folder)


# ---- tensors ----


def _tensors(component: str, stored: StoredModel, form: str) -> Iterator[OutputTensor]:
    """Yield the tensors that a load in bfloat16 would give, of the form "fp8" in two parts."""
    model = stored.meta_model(torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in stored.format.body(model).named_parameters()}
    float8 = set(_block_linears(model)) if form == "fp8" else set()
    for own in stored.official_names:
        tensor, origin, dtype = stored.tensors[own], stored.origins[own], dtypes[own]
        layer = own.removesuffix(".weight")
        if own != layer and layer in float8 and not isinstance(tensor, QuantizedTensor):
            data = _Float8Data(component, own, origin, own, tensor, _FLOAT8, dtype)
            yield data
            yield _Float8Scales(component, own, origin, f"{layer}.weight_scale", tensor, torch.float32, data)
        else:
            yield OutputTensor(component, own, origin, own, tensor, dtype)


def _block_linears(model: nn.Module) -> Iterator[str]:
    """Yield the names of the layers that wan22.accel.quantize quantises in a transformer."""
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            yield name


@dataclass(frozen=True)
class _Float8Data(OutputTensor):
    """A weight "o i" in float8."""

    computed: torch.dtype  # that it is rounded to first, as in a load
    scales: list[torch.Tensor] = field(default_factory=list, compare=False)  # known once pieces are through

    def pieces(self) -> Iterator[torch.Tensor]:
        self.scales.clear()
        for rows in self.tensor.split(ROWS):  # type: ignore[union-attr]
            data, scale = scaled_numbers(rows.to(self.computed), self.dtype)
            self.scales.append(scale)
            yield data.view(self.dtype)


@dataclass(frozen=True)
class _Float8Scales(OutputTensor):
    """The scales "o 1" of such a weight."""

    data: _Float8Data

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0], 1)

    def pieces(self) -> Iterator[torch.Tensor]:
        if not self.data.scales:  # another file's weight, which an earlier call has written
            for _ in self.data.pieces():
                pass
        yield torch.cat(self.data.scales).flatten(1)
        self.data.scales.clear()
