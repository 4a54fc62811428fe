"""What pictures and videos say of their recipes: captions, and labels of what differs between several."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import printable
from .recipe import IMAGES, Recipe

# Settings by the words that labels use; others by their own names.
WORDS = {
    "num_inference_steps": "steps",
    "flow_shift": "shift",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance of the second expert",
    "negative_prompt": "negative",
    "quantized": "quantised",
}
# What is said where a setting is absent.
ABSENT = {
    "quantized": "not quantised",
    "accelerated": "not accelerated",
    "compiled": "not compiled",
    "tiled": "not tiled",
    "cast": "not cast",
    "step_cache": "no step cache",
    "token_parts": "tokens in one part",
    "attention": "native attention",
    "distilled": "not distilled",
    "guidance": "plain guidance",
    "guidance_interval": "guidance in all steps",
    "cache": "every pass computed",
    "loras": "no LoRA",
}
# Entries of a call that others below say better, or that change nothing.
_LEFT_OUT = {"num_videos_per_prompt", "height", "width", "max_area", *IMAGES}


def caption(recipe: Recipe, seconds: float = math.nan, prompt: bool = True) -> str:
    """Return one video's prompt and, on a line of their own, seed, size, steps and the time that it took.

    Args:
        seconds: that making it took; NaN: unknown.
        prompt: whether the prompt is said.
    """
    length = recipe.num_frames / recipe.fps
    size = f"{recipe.width}x{recipe.height}, {recipe.num_frames} frames at {recipe.fps} fps ({length:.1f} s)"
    parts = [f"seed {recipe.seeds[0]}", size, f"{recipe.num_inference_steps} steps", recipe.checkpoint]
    lines = [recipe.prompts[0] or ""] if prompt else []
    lines.append(", ".join([*parts, *_time(seconds)]))
    return "\n".join(filter(None, map(_one_line, lines)))


def labels(recipes: Sequence[Recipe], seconds: Sequence[float] = ()) -> list[str]:
    """Return for each of several videos what differs in its recipe from others'; the seed if nothing does.

    `seconds`, that making each took, are said, too. Prompts that differ are on a line of their own.
    """
    tables = [_settings(recipe) for recipe in recipes]
    names = dict.fromkeys(name for table in tables for name in table)  # a set in order
    differing = [name for name in names if len({table.get(name) for table in tables}) > 1]
    told = []
    for i, table in enumerate(tables):
        parts = {name: table.get(name) or ABSENT.get(name) or f"no {_word(name)}" for name in differing}
        prompt = parts.pop("prompt", "")
        rest = [*(parts.values() or [f"seed {recipes[i].seeds[0]}"])]
        lines = [prompt, ", ".join([*rest, *_time(seconds[i] if seconds else math.nan)])]
        told.append("\n".join(filter(None, map(_one_line, lines))))
    return told


def shared_caption(recipes: Sequence[Recipe], prompt: bool = True) -> str:
    """Return the prompt and the settings of `caption` that several recipes have in common."""
    captions = [caption(recipe, prompt=False).split(", ") for recipe in recipes]
    common = [part for part in captions[0] if all(part in other for other in captions[1:])]
    texts = {recipe.prompts[0] for recipe in recipes} if prompt else set()
    lines = [(texts.pop() or "") if len(texts) == 1 else "", ", ".join(common)]
    return "\n".join(filter(None, map(_one_line, lines)))


def _settings(recipe: Recipe) -> dict[str, str]:
    """Return a recipe's settings in words, by name; those that are off or not given are left out."""
    call = recipe.call
    found = {"prompt": recipe.prompts[0] or "", "seed": f"seed {recipe.seeds[0]}"}
    found["size"] = f"{recipe.width}x{recipe.height}"
    found["num_inference_steps"] = f"{recipe.num_inference_steps} steps"
    for name, value in call.items():
        if value is not None and name not in _LEFT_OUT:
            found.setdefault(name, _said(name, value))
    for name, marks in recipe.pictures.items():
        names = [value or "in memory" for value in call.get(name) or ()]
        told = (
            f"{_word(name)} {n} ({mark.rpartition(':')[2][:8]})"
            for n, mark in zip(names, marks, strict=False)
        )
        found[name] = ", ".join(told)
    found["scheduler"] = recipe.scheduler
    found["checkpoint"] = recipe.checkpoint
    if recipe.loras:
        found["loras"] = ", ".join(
            f"LoRA {lora.name} at {_strengths(lora.strengths)}" for lora in recipe.loras
        )
    found["dtypes"] = ", ".join(f"{name} {dtype}" for name, dtype in sorted(recipe.dtypes.items()))
    found |= {name: _said(name, value) for name, value in recipe.changes.items() if value}
    if isinstance(tables := recipe.changes.get("quantized"), Mapping):  # earlier versions wrote names alone
        found["quantized"] = _quantized(tables, recipe.boundary_ratio is not None)
    return found | {"device": recipe.device, "fps": f"{recipe.fps} fps"}


def _said(name: str, value: Any) -> str:
    """Return a setting in a few words."""
    if value is True:
        return _word(name)
    if isinstance(value, str):
        return f"{_word(name)} {value}"
    if name == "guidance" and isinstance(value, Mapping):
        rest = _plain({setting: inner for setting, inner in value.items() if setting != "name"})
        return f"{_plain(value.get('name'))} guidance{rest and f' ({rest})'}"
    if name == "cache" and isinstance(value, Mapping):
        settings = {n: v for n, v in value.items() if n not in ("method", "ratios")}
        return f"{value.get('method')} cache, {_plain(settings)}"
    return f"{_word(name)} {_plain(value)}"


def _quantized(tables: Mapping[str, Mapping[str, Any]], two: bool) -> str:
    """Return how models are quantised: "fp8 quantised"; by model if they differ, or one of two is not."""
    told = {}
    for model, table in ((m, table) for m, table in tables.items() if isinstance(table, Mapping)):
        kept, formats = table.get("blocks kept"), sorted(form for form in table if form != "blocks kept")
        told[model] = ", ".join(formats) + (f" but blocks {kept}" if kept else "")
    experts = {"transformer", "transformer_2"} if two else {"transformer"}
    if len({*told.values()}) == 1 and experts <= {*told}:
        return f"{next(iter(told.values()))} {_word('quantized')}"
    return f"{_word('quantized')}: {', '.join(f'{model} {text}' for model, text in told.items())}"


def _plain(value: Any) -> str:
    """Return a value without brackets and quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _strengths(strengths: Mapping[str, Any]) -> str:
    return "/".join(dict.fromkeys(map(_plain, strengths.values())))


def _word(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _time(seconds: float) -> list[str]:
    return [] if math.isnan(seconds) else [f"made in {seconds:.1f}\N{NO-BREAK SPACE}s"]


def _one_line(text: str) -> str:
    return printable(re.sub(r"[\t\n\r ]+", " ", text).strip())
