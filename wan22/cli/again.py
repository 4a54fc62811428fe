"""`wan22 reproduce`: a video is made again from the recipe in its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .running import LOADING, Result, ends_with_a_step, load, name_of, report, say


def run_again(given: Mapping[str, Any]) -> None:
    """Load what the recipe names, set it up as it was, make the video, save it."""
    from ..video.metadata import read_recipe

    recipe = read_recipe(given["file"])
    options: dict[str, Any] = dict.fromkeys(LOADING)
    options |= {name: given[name] for name in ("model", "dtype", "device", "memory")}
    options["model"] = given["model"] or (recipe.origin and recipe.origin.place) or recipe.checkpoint
    if recipe.origin is not None and recipe.origin.revision is not None and given["model"] is None:
        options["revision"] = recipe.origin.revision if "/" in str(options["model"]) else None
    options["dtype"] = given["dtype"] or dict(recipe.dtypes)
    changes = dict(recipe.changes)
    kernels = changes.get("attention", ())
    options["attention"] = kernels[0] if len(kernels) == 1 else None
    options["accelerate"] = bool(changes.get("accelerated"))
    options["compile"], options["tiling"] = bool(changes.get("compiled")), bool(changes.get("tiled"))
    loras = []
    for lora in recipe.loras:
        if lora.source is None:
            raise ValueError("the recipe's LoRA was in memory; use pipe.reproduce")
        places = lora.source.split(", ")
        pair = dict(zip(("high", "low"), places, strict=True)) if len(places) == 2 else {"lora": places[0]}
        loras.append({**pair, "strength": dict(lora.strengths)})
    task = "i2v" if recipe.pipeline == "WanI2VPipeline" else "t2v"
    pipe = load(task, options, given["quiet"], loras)
    target = given["output"] or name_of(f"{Path(given['file']).stem} again")
    say(f"{recipe}, to {target}", given["quiet"])
    replaced = {name: given[name] for name in ("image", "last_image", "seed") if given[name] is not None}
    with ends_with_a_step(pipe):
        video = pipe.reproduce(recipe, **replaced)
    files = video.save(target, given["overwrite"], quality=given["quality"], crf=given["crf"])
    stopped = video.recipe.steps_done is not None
    made = Result([str(file) for file in files], video.recipe.to_dict(), stopped=stopped)
    report(made, given["as_json"])
