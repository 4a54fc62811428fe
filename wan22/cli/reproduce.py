"""`wan22 reproduce`: make a video again from the recipe in its file."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..video.recipe import Recipe
from .loading import load
from .options import Encoding, Loading, Reporting, Source, Target
from .reporting import report, say
from .running import free_name, make
from .signatures import PIPELINES


def reproduce_file(
    file: Path,
    replaced: Mapping[str, Any],
    source: Source,
    target: Target,
    encoding: Encoding,
    reporting: Reporting,
) -> None:
    """Load what a recipe names, set it up as it was, make the video, save it.

    Args:
        file: video with its recipe.
        replaced: arguments of the call that replace the recipe's.
        source: what to load instead of the recipe's checkpoint, and how.
        target: file of the video.
        encoding: how it is written.
        reporting: what is printed.
    """
    from ..video.metadata import read_recipe

    recipe = read_recipe(file)
    task = next((task for task, name in PIPELINES.items() if name == recipe.pipeline), "t2v")
    dtypes = recipe.dtypes if source.dtype is None else None
    pipe = load(task, _setup(recipe, source), reporting.quiet, _loras(recipe), dtypes)
    output = target.output or free_name(f"{file.stem} again")
    say(f"{recipe}, to {output}", reporting.quiet)
    run = partial(pipe.reproduce, recipe, **replaced)
    report(make(pipe, run, output, encoding, target.overwrite), reporting.as_json)


def _setup(recipe: Recipe, source: Source) -> Loading:
    """Return the options that load and set up a pipeline as it was for a recipe."""
    origin, changes = recipe.origin, recipe.changes
    options = asdict(source)
    if source.model is None:
        options["model"] = origin.place if origin is not None else recipe.checkpoint
        if origin is not None and "/" in origin.place:
            options["revision"] = origin.revision
    kernels = changes.get("attention", ())
    return Loading(
        **options,
        attention=kernels[0] if len(kernels) == 1 else None,
        accelerate=bool(changes.get("accelerated")),
        compile=bool(changes.get("compiled")),
        tiling=bool(changes.get("tiled")),
    )


def _loras(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the arguments of load_lora_weights for a recipe's LoRAs."""
    loras = []
    for lora in recipe.loras:
        if lora.source is None:
            raise ValueError("the recipe's LoRA was in memory; use pipe.reproduce")
        places = lora.source.split(", ")
        pair = dict(zip(("high", "low"), places, strict=True)) if len(places) == 2 else {"lora": places[0]}
        loras.append({**pair, "strength": dict(lora.strengths)})
    return loras
