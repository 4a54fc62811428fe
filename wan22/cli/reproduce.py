"""`wan22 reproduce`: make a video again from the recipe in its file."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..video.recipe import Recipe
from .loading import BESIDE_A_FILE, load
from .options import Loading, Saving, Target
from .reporting import report, say
from .running import free_name, make
from .signatures import PIPELINES


def reproduce_file(
    file: Path, replaced: Mapping[str, Any], loading: Loading, target: Target, saving: Saving
) -> None:
    """Load what a recipe names, set it up as it was, make the video, save it.

    `replaced` are arguments of the call, and `loading` options, in place of the recipe's.
    """
    from ..video.metadata import read_recipe

    recipe = read_recipe(file)
    task = next((task for task, name in PIPELINES.items() if name == recipe.pipeline), "t2v")
    pipe = load(task, _recorded(recipe, loading), saving.quiet, _loras(recipe, loading), recipe.dtypes)
    path = target.output or free_name(f"{file.stem} again")
    say(f"{recipe}, to {path}", saving.quiet)
    run = partial(pipe.reproduce, recipe, **replaced)
    report(make(pipe, run, path, target.overwrite, saving), saving.as_json)


def _recorded(recipe: Recipe, given: Loading) -> Loading:
    """Return the given options, completed with those that set a pipeline up as a recipe tells."""
    origin, changes = recipe.origin, recipe.changes
    kernels = changes.get("attention", ())
    known: dict[str, Any] = {"attention": kernels[0] if len(kernels) == 1 else None}
    known |= {"accelerate": "accelerated" in changes, "compile": "compiled" in changes}
    known["tiling"] = "tiled" in changes
    places = [recipe.checkpoint] if origin is None else origin.place.split(", ")
    if given.model is None and len(places) in (4, 5):  # single files, of one transformer or two
        known |= zip(("model", *BESIDE_A_FILE[1 - len(places) :]), places, strict=True)
    elif given.model is None:
        known["model"] = recipe.checkpoint if origin is None else origin.place
        known["revision"] = origin.revision if origin is not None and "/" in origin.place else None
    return replace(given, **{name: value for name, value in known.items() if not getattr(given, name)})


def _loras(recipe: Recipe, given: Loading) -> list[dict[str, Any]]:
    """Return the arguments of load_lora_weights for a recipe's LoRAs, unless others are given."""
    if given.lora or given.lora_high or given.lora_low:
        return []
    loras = []
    for lora in recipe.loras:
        if lora.source is None:
            raise ValueError("the recipe's LoRA was in memory; use pipe.reproduce")
        places = lora.source.split(", ")
        keys = ("high", "low") if len(places) == 2 else ("pretrained_model_name_or_path_or_dict",)
        loras.append({**dict(zip(keys, places, strict=True)), "strength": dict(lora.strengths)})
    return loras
