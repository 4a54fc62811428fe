"""Prepared models in place of those that a load would convert, and preparing them."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ...accel.quantization.settings import Quantization
from ...checkpoints.loading.stored import StoredModel
from ...checkpoints.preparing.cache import FORMS, cache_folder, find_prepared, is_preparable
from ...checks import check_choice, shown
from ...progress import bytes_bar
from .checkpoint import PREPARED, TRANSFORMERS, Wanted

logger = logging.getLogger(__name__)

WORTH_A_LINE = 10**9  # bytes that a load converts


def wanted_in(form: str, wanted: Wanted, quantize: Quantization | None) -> tuple[Wanted, Quantization | None]:
    """Return what a constructor with `prepare=form` loads, and how it quantises.

    A ValueError says that another argument asks for another dtype or form.
    """
    check_choice("prepare", form, FORMS)
    for name in PREPARED:
        if (dtype := wanted.dtype_of(name)) not in (None, torch.bfloat16):
            rule = f"what prepare={shown(form)} writes is loaded in torch.bfloat16; leave dtype out for it"
            raise ValueError(f"dtype={dtype} for {name}: {rule}")
    fp8 = Quantization("fp8")
    if form == "fp8" and quantize not in (None, fp8):
        raise ValueError(
            f"quantize={shown(str(quantize))}: prepare='fp8' is quantised already; prepare='bf16' is not"
        )
    if form == "fp8" and wanted.dequantize:
        raise ValueError("dequantize=True undoes prepare='fp8'; prepare='bf16' has ordinary weights")
    asked = wanted.dtype if isinstance(wanted.dtype, Mapping) else {"default": wanted.dtype}
    dtypes = {**asked, **dict.fromkeys(PREPARED, torch.bfloat16)}
    return replace(wanted, dtype=dtypes), fp8 if form == "fp8" else quantize


def find_all(models: Mapping[str, StoredModel], wanted: Wanted) -> dict[str, StoredModel]:
    """Return the prepared models of those that a load would convert, by component."""
    return {name: found for name, stored in models.items() if (found := _find(name, stored, wanted))}


def _find(name: str, stored: StoredModel, wanted: Wanted) -> StoredModel | None:
    found = (find_prepared(stored, form) for form in _forms(name, wanted) if is_preparable(stored, form))
    return next((prepared for prepared in found if prepared is not None), None)


def _forms(name: str, wanted: Wanted) -> Iterator[str]:
    """Yield the forms that give what is wanted, the smallest first."""
    later = wanted.later if name in TRANSFORMERS else None
    if (later or wanted.dtype_of(name)) != torch.bfloat16:
        return
    if name in wanted.fp8 and not wanted.dequantize:
        yield "fp8"
    yield "bf16"


def report(
    source: str, models: Mapping[str, StoredModel], prepared: Mapping[str, StoredModel], wanted: Wanted
) -> None:
    """Log in one line which models are prepared, and in one what a load of the others costs each time."""
    if prepared:
        logger.info("%s: %s as prepared in %s", source, ", ".join(prepared), cache_folder())
    costs = {
        name: stored.bytes_to_convert(wanted.dtype_of(name))
        for name, stored in models.items()
        if name not in prepared and name in PREPARED and is_preparable(stored, "bf16")
    }
    costs = {name: cost for name, cost in costs.items() if cost and "bf16" in _forms(name, wanted)}
    if (total := sum(costs.values())) < WORTH_A_LINE:
        return
    after = sum(values_of(models[name]) for name in costs) * torch.bfloat16.itemsize
    logger.warning(
        "%s: each load reads %.3g GB and converts them to %.3g GB of bfloat16 in memory; %s does it once, "
        "for as much of the disk (in Python: prepare='bf16')",
        *(source, total / 1e9, after / 1e9, _command(source, [models[name] for name in costs])),
    )


def load_all(models: Mapping[str, StoredModel], wanted: Wanted) -> dict[str, Any]:
    """Load models, and show the bytes that are converted."""
    loaded = {}
    with loading_bar(models, wanted) as bar:
        for name, stored in models.items():
            bar.set_description(f"loading {name}", refresh=False)
            loaded[name] = stored.load(wanted.dtype_of(name), wanted.dequantize)
    return loaded


def load_prepared(models: Mapping[str, StoredModel]) -> dict[str, Any]:
    """Load prepared models as they are stored, and checked already: all weights are mapped, and none read."""
    return {name: stored.load(check=False) for name, stored in models.items()}


def loading_bar(models: Mapping[str, StoredModel], wanted: Wanted) -> AbstractContextManager[Any]:
    """Return the bar of the bytes that loading models converts."""
    costs = [stored.bytes_to_convert(wanted.dtype_of(n), wanted.dequantize) for n, stored in models.items()]
    return bytes_bar(sum(costs), "loading")


def _command(source: str, models: Iterable[StoredModel]) -> str:
    """Return the command that prepares a checkpoint, or the single files that it is of."""
    places = dict.fromkeys(stored.source for stored in models) if ", " in source else [source]
    return " and ".join(f"`wan22 prepare {place}`" for place in places)


def values_of(stored: StoredModel) -> int:
    """Return the number of a model's values."""
    return sum(torch.Size(stored.tensors[name].shape).numel() for name in stored.official_names)


def bytes_to_download(repository: str, patterns: list[str], hub: Mapping[str, Any]) -> int | None:
    """Return the bytes of a repository that are not here yet; None if nobody can say."""
    try:
        files = snapshot_download(repository, allow_patterns=patterns, dry_run=True, **hub)
    except (OSError, ValueError):  # the download says what is wrong
        return None
    return sum(file.file_size or 0 for file in files if file.will_download)
