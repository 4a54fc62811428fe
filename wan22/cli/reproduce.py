"""`wan22 reproduce`: make a video again from the recipe in its file, which anybody may have written."""

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import typer

from ..accel.parallel.environment import launched
from ..pictures import is_url
from ..presets import PRESETS
from ..video.privacy import without_folders
from ..video.recipe import IMAGES, Recipe, UsedLora
from ..web import masked
from .checking import check_all, check_loading, check_output
from .loading import BESIDE_A_FILE, find_device, load, split_strength
from .options import Loading, Output, Saving, Target, flags_of
from .planning import print_plan
from .reporting import report, say, warn
from .running import free_name, make
from .signatures import PIPELINES

_MOST_SHOWN = 8  # places in a message
_ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+)?")  # org/name, org/name/file


class Named(NamedTuple):
    """A place outside of the file that a recipe names, and the option that gives it."""

    option: str
    place: str

    @property
    def downloaded(self) -> bool:
        """Whether it is on the hub or on the web, and nothing of this machine."""
        if is_url(self.place) or self.option in map(_flag, IMAGES):
            return is_url(self.place)
        known = self.place.lower() in {preset.name.lower() for preset in PRESETS}
        return known or (_ON_THE_HUB.fullmatch(self.place) is not None and not Path(self.place).exists())

    @property
    def here(self) -> bool:
        """Whether there is a file or folder of this name, seen from the working folder."""
        return Path(self.place).expanduser().exists()


def reproduce_file(
    file: Path,
    replaced: Mapping[str, Any],
    loading: Loading,
    target: Target,
    saving: Saving,
    output: Output,
    allow_download: bool = False,
    anyway: bool = False,
) -> None:
    """Load what a recipe names, set it up as it was, make the video, save it.

    `replaced` are arguments of the call, and `loading` options, in place of the recipe's. What it names
    outside of its file and they do not give is used if `allow_download` covers it, or the person at the
    terminal agrees.
    """
    from ..video.metadata import read_recipe

    recipe = read_recipe(file)
    path = target.output or free_name(f"{file.stem} again")
    count = len(recipe.seeds)
    check_output(path, count, target, saving)
    ask(file, _named(recipe, replaced, loading), allow_download)
    task = next((task for task, name in PIPELINES.items() if name == recipe.pipeline), "t2v")
    loras = _loras(recipe, loading)
    others = replace(loading, lora=None, lora_high=None, lora_low=None) if loras else loading
    recorded = _recorded(recipe, others)
    say(f"{recipe}, to {path}")
    if target.dry_run:
        call = {name: value for name, value in recipe.call.items() if value is not None} | dict(replaced)
        print_plan(task, recorded, check_all(task, call, recorded, path, dry=True), output, path)
        return
    check_loading(task, recorded)
    pipe = load(task, recorded, output, loras, recipe.dtypes)
    run = partial(pipe.reproduce, replace(recipe, outside=False), anyway=anyway, **replaced)
    report(make(pipe, run, path, count, target, saving), output)


# ---- what a recipe names ----


def _named(recipe: Recipe, replaced: Mapping[str, Any], given: Loading) -> list[Named]:
    """Return what a recipe names and the options do not give; the miniatures are inside wan22."""
    named = []
    inside = {preset.name.lower() for preset in PRESETS if not preset.repo}
    if given.model is None and (place := _place(recipe)).lower() not in inside:
        places = place.split(", ")
        files = len(places) in (4, 5)  # of one transformer or two
        options = ("model", *BESIDE_A_FILE[1 - len(places) :]) if files else ("model",)
        named += [Named(_flag(o), p) for o, p in zip(options, places if files else [place], strict=True)]
    if not _given_loras(given):
        for lora in recipe.loras:
            places = _lora_places(lora)
            options = ("lora_high", "lora_low") if len(places) == 2 else ("lora",) * len(places)
            named += [Named(_flag(o), p) for o, p in zip(options, places, strict=True)]
    for name in IMAGES:
        images = None if name in replaced else recipe.call.get(name)
        listed = images if isinstance(images, list) else [images]
        named += [Named(_flag(name), str(image)) for image in listed if image is not None]
    return named


def ask(file: Path, named: list[Named], allow_download: bool) -> None:
    """Ask at a terminal whether what a recipe names is used; elsewhere, a ValueError names the options."""
    asked = [entry for entry in named if not (allow_download and entry.downloaded)]
    if not asked:
        return
    told = [f"{entry.option} {shlex.quote(masked(entry.place))}" for entry in asked]
    options = " ".join(told[:_MOST_SHOWN])
    if len(asked) > _MOST_SHOWN:
        options += f" and {len(asked) - _MOST_SHOWN} more"
    if at_a_terminal() and all(entry.downloaded or entry.here for entry in asked):
        warn(f"the recipe in {file} names: {options}")
        if not typer.confirm("load them from there?", err=True):
            raise typer.Exit(1)
        return
    rest = ", or --allow-download for what is not on this machine" if any(e.downloaded for e in asked) else ""
    missing = any(not entry.downloaded and not entry.here for entry in asked)
    where = "; recipes leave out the folders" if missing else ""
    raise ValueError(f"{file} names what is not loaded unasked; give {options}{rest}{where}")


def at_a_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin.isatty() and not launched()


def _place(recipe: Recipe) -> str:
    return recipe.checkpoint if recipe.origin is None else recipe.origin.place


def _lora_places(lora: UsedLora) -> list[str]:
    if lora.source is None:
        raise ValueError("the recipe's LoRA was in memory; use pipe.reproduce")
    return lora.source.split(", ")


def _given_loras(given: Loading) -> set[str]:
    """Return the LoRAs of the options, without strengths."""
    loras = {split_strength(text)[0] for text in given.lora or ()}
    return loras | {text for text in (given.lora_high, given.lora_low) if text is not None}


def _flag(name: str) -> str:
    return flags_of(name)[0]


# ---- how it was set up ----


def _recorded(recipe: Recipe, given: Loading) -> Loading:
    """Return the given options, completed with those that set a pipeline up as a recipe tells."""
    origin, changes = recipe.origin, recipe.changes
    kernels = changes.get("attention")
    kernel = kernels[0] if isinstance(kernels, tuple) and len(kernels) == 1 else None
    known: dict[str, Any] = {"attention_backend": kernel if isinstance(kernel, str) else None}
    known |= {"accelerate": "accelerated" in changes, "compile": "compiled" in changes}
    known["tiling"] = "tiled" in changes
    known |= {"quantize": _quantization(recipe), "memory": _memory(recipe, given)}
    places = _place(recipe).split(", ")
    if given.model is None and len(places) in (4, 5):  # single files, of one transformer or two
        known |= zip(("model", *BESIDE_A_FILE[1 - len(places) :]), places, strict=True)
    elif given.model is None or without_folders(given.model) == without_folders(_place(recipe)):
        known["model"] = _place(recipe)
        known["revision"] = origin.revision if origin is not None and "/" in origin.place else None
    return replace(given, **{name: value for name, value in known.items() if not getattr(given, name)})


def _quantization(recipe: Recipe) -> str | None:
    """Return what --quantize says of the transformers; None if it cannot say what a recipe has."""
    from ..accel.quantization.settings import from_recipe

    found = from_recipe(recipe.changes.get("quantized"), 1 if recipe.boundary_ratio is None else 2)
    return None if found is None else str(found)


def _memory(recipe: Recipe, given: Loading) -> str | None:
    """Return the memory that the recipe's plans had; where there is no GPU, plans are for the CPU."""
    if recipe.memory is None or given.device is not None or given.parallel is not None or launched():
        return None
    import torch

    from ..devices import has_own_memory

    return recipe.memory if has_own_memory(torch.device(find_device(None))) else "auto"


def _loras(recipe: Recipe, given: Loading) -> list[dict[str, Any]]:
    """Return the arguments of load_lora_weights for a recipe's LoRAs, unless others are given.

    Those that the options give, of the same names, have the recipe's strengths.
    """
    places = {without_folders(place) for lora in recipe.loras for place in _lora_places(lora)}
    options = {without_folders(place): place for place in _given_loras(given)}
    if options and options.keys() != places:
        return []
    loras = []
    for lora in recipe.loras:
        own = [options.get(without_folders(place), place) for place in _lora_places(lora)]
        keys = ("high", "low") if len(own) == 2 else ("pretrained_model_name_or_path_or_dict",)
        loras.append({**dict(zip(keys, own, strict=True)), "strength": dict(lora.strengths)})
    return loras
