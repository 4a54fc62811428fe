"""What a recipe may hold: it is read from files that anybody may have written."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import cut, shown

# Characters of a recipe's text. One video's has 2,000 and its prompts; what is far larger is no recipe.
MOST_TEXT = 2**24
_LONGEST, _LONGEST_NAME = 10**6, 4096
_MOST_ENTRIES, _MOST_DEPTH = 10**6, 6
_LARGEST = 2**63 - 1

# Takes an entry's name and its value; a ValueError names both, and the rule.
Check = Callable[[str, Any], None]


def parsed(text: str) -> dict[str, Any]:
    """Return JSON's outermost table; a ValueError refuses anything else in a few words."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"its text has {len(text)} characters, a recipe's at most {MOST_TEXT}")
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"its text is {_kind(values)}, not a table")
    return values


def check_recipe(values: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError that names the entry, its value and the rule, what is no recipe."""
    _RECIPE("", values)
    call = values["call"]
    videos = len(call["prompt"]) * call["num_videos_per_prompt"]
    if len(call["seed"]) != videos:
        raise ValueError(f"call.seed has {len(call['seed'])} values for {videos} videos")


# ---- kinds of entries ----


def _text(most: int = _LONGEST) -> Check:
    def check(entry: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > most:
            raise _wrong(entry, value, f"a text of at most {most} characters")

    return check


def _whole(least: int = 1, most: int = _LARGEST) -> Check:
    def check(entry: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _wrong(entry, value, f"a whole number from {least} to {most}")

    return check


def _number(entry: str, value: Any) -> None:
    finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300
    if not finite:
        raise _wrong(entry, value, "a finite number")


def _or_null(check: Check) -> Check:
    return lambda entry, value: None if value is None else check(entry, value)


def _list(of: Check, least: int = 0) -> Check:
    def check(entry: str, value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= _MOST_ENTRIES:
            raise _wrong(entry, value, f"a list of {least} to {_MOST_ENTRIES} entries")
        for i, inner in enumerate(value):
            of(f"{entry}[{i}]", inner)

    return check


def _wholes(count: int) -> Check:
    def check(entry: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != count:
            raise _wrong(entry, value, f"{count} whole numbers")
        for inner in value:
            _whole(0)(entry, inner)

    return check


def _table(of: Check) -> Check:
    def check(entry: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(entry, value, "a table")
        for name, inner in value.items():
            of(f"{entry}.{cut(name)}", inner)

    return check


def _any(entry: str, value: Any, depth: int = _MOST_DEPTH) -> None:
    """Accept any plain value whose lists and tables are not nested deeply."""
    if isinstance(value, dict | list) and not depth:
        raise _wrong(entry, value, f"nested at most {_MOST_DEPTH} times")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _any(entry, inner, depth - 1)


def _record(needed: Mapping[str, Check], others: Mapping[str, Check], rest: Check | None = None) -> Check:
    """Accept a table with certain entries; `rest` checks those that are not named here."""

    def check(entry: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(entry, value, "a table")
        start = f"{entry}." if entry else ""
        for name in needed:
            if name not in value:
                raise ValueError(f"{start}{name} is missing")
        for name, inner in value.items():
            known = needed.get(name) or others.get(name) or rest
            if known is not None:
                known(f"{start}{cut(name)}", inner)

    return check


def _wrong(entry: str, value: Any, rule: str) -> ValueError:
    return ValueError(f"{cut(entry)}={shown(value)} must be {rule}")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def _name_or_table(entry: str, value: Any) -> None:
    check = _table(_any) if isinstance(value, Mapping) else _text(_LONGEST_NAME)
    check(entry, value)


# ---- a recipe ----

_name, _texts, _sizes = _text(_LONGEST_NAME), _list(_or_null(_text()), least=1), _or_null(_whole())
_numbers = _or_null(_list(_number))


def _number_or_numbers(entry: str, value: Any) -> None:
    (_list(_number, least=1) if isinstance(value, list) else _number)(entry, value)


# Of the call's arguments, those with rules of their own; another pipeline may have others. Images are checked
# where they are opened, which a recipe from outside does not bring about.
_CALL = _record(
    {
        "prompt": _texts,
        "seed": _list(_or_null(_whole(0, 2**64 - 1)), least=1),
        "num_videos_per_prompt": _whole(),
        "guidance_scale": _number_or_numbers,
    },
    {
        "negative_prompt": _or_null(_list(_or_null(_text()))),
        "guidance_scale_2": _or_null(_number),
        "flow_shift": _or_null(_number),
        "sigmas": _numbers,
        "timesteps": _numbers,
        "distilled": _or_null(_name_or_table),
        "guidance": _or_null(_record({"name": _name}, {}, rest=_any)),
        "guidance_interval": _numbers,
        # Settings, not the name of a file: what a recipe names is not opened unasked.
        "cache": _or_null(_table(_any)),
        "attention": _or_null(_table(_any)),
        "resolution_schedule": _or_null(_list(_list(_number))),
        "noise_device": _or_null(_name),
        "fit": _or_null(_name),
        "attention_kwargs": _or_null(_table(_any)),
        **dict.fromkeys(("num_frames", "height", "width", "max_area"), _sizes),
        "num_inference_steps": _sizes,
        "max_sequence_length": _whole(),
    },
    rest=_any,
)
_ORIGIN = _record(
    {"place": _name},
    {"revision": _or_null(_name), "files": _table(_name), "replaced": _list(_name)},
)
_LORA = _record(
    {"name": _name, "source": _or_null(_name), "strengths": _table(_number)}, {"files": _table(_name)}
)
NEEDED: dict[str, Check] = {
    "checkpoint": _name,
    "pipeline": _name,
    "call": _CALL,
    "width": _whole(),
    "height": _whole(),
    "num_frames": _whole(),
    "fps": _whole(),
    "scheduler": _name,
    "num_inference_steps": _whole(),
}
OTHERS: dict[str, Check] = {
    "boundary_ratio": _or_null(_number),
    "scheduler_config": _table(_any),
    "pictures": _table(_list(_name)),
    "origin": _or_null(_ORIGIN),
    "loras": _list(_LORA),
    "dtypes": _table(_name),
    "changes": _table(_any),
    "memory": _or_null(_name),
    "device": _text(_LONGEST_NAME),
    "versions": _table(_name),
    "steps_done": _or_null(_whole(0)),
    "passes": _list(_wholes(2)),
    "sizes": _list(_wholes(3)),
    "not_reproducible_because": _or_null(_text(_LONGEST_NAME)),
}
_RECIPE = _record(NEEDED, OTHERS)


# ---- what is made again unasked ----

# Far beyond what a call makes, and far below what fills a machine: a file's recipe alone must not do so.
MOST_VIDEOS, MOST_STEPS, MOST_PIXELS = 1000, 10_000, 10**11


def check_extent(recipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse a recipe whose call would run or grow without end, for arguments that the caller does not give.

    Raises: ValueError: it asks for more than MOST_VIDEOS, MOST_STEPS or MOST_PIXELS.
    """
    call, config = recipe.call, recipe.scheduler_config
    videos = len(call["prompt"]) * call["num_videos_per_prompt"]
    sides = [call.get(name) or getattr(recipe, name) for name in ("width", "height", "num_frames")]
    asked = {
        "prompt": (videos, MOST_VIDEOS),
        "num_inference_steps": (call.get("num_inference_steps"), MOST_STEPS),
        "sigmas": (call.get("sigmas"), MOST_STEPS),
        "timesteps": (call.get("timesteps"), MOST_STEPS),
        "num_train_timesteps": (config.get("num_train_timesteps"), MOST_STEPS),
        "trained_betas": (config.get("trained_betas"), MOST_STEPS),
        "max_area": (call.get("max_area"), MOST_PIXELS),
        "num_frames": (videos * math.prod(sides), MOST_PIXELS),
    }
    for name, (value, most) in asked.items():
        count = len(value) if isinstance(value, list | tuple) else value
        if name not in given and isinstance(count, int) and count > most:
            what = {"prompt": "videos", "num_frames": "pixels"}.get(name, name)
            raise ValueError(f"the recipe asks for {shown(count)} {what}, more than {most}; give {name}=")
