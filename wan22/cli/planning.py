"""`wan22 plan` and `--dry-run`: what a video takes, before anything is downloaded or loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .checking import Outline, check_all, existing, plan_of
from .loading import find_model, hub_options, preset_of
from .options import Loading, Output
from .outline import Settings
from .reporting import aligned, print_lines, say
from .signatures import PIPELINES


def plan_model(model: str, call: Mapping[str, Any], loading: Loading, output: Output) -> None:
    """Print the plan of a call of a checkpoint; an image, where one is needed, has the video's size."""
    loading = replace(loading, model=model)
    say(f"planning for {model}")
    task, pipe = outlined_task(loading)
    call = _with_inputs(task, call, pipe)
    outline = check_all(task, call, loading, Path("video.mp4"), dry=True, pipe=pipe)
    print_plan(task, loading, outline, output)


def print_plan(
    task: str, loading: Loading, outline: Outline | None, output: Output, path: Path | None = None
) -> None:
    """Print what a call takes, as a table or as JSON."""
    findings = _findings(task, loading, outline)
    if path is not None:
        findings["output"] = str(path)
    if output.as_json:
        print(json.dumps(findings))
        return
    print_lines(aligned(_in_words(findings).items()))


# ---- what is found ----


def _findings(task: str, loading: Loading, outline: Outline | None) -> dict[str, Any]:
    """Return what a call takes; None where nothing here tells."""
    source = find_model(loading.model, task)
    found: dict[str, Any] = {"model": str(loading.model or f"tiny-{task}"), "source": str(source)}
    found |= {"here": Path(source).exists(), "download_bytes": _download(source, task, loading)}
    found |= {"settings": None, "memory": None, "fits": None}
    found |= {"seconds_per_step": None, "seconds_to_pin": None, "seconds_in_all": None}
    if outline is None:
        return found
    found["settings"] = asdict(outline.settings) | {"text": str(outline.settings)}
    del found["settings"]["kinds"]  # which are for plans
    try:
        plan = plan_of(outline.pipe, outline.settings, loading)
    except ValueError as error:  # nothing fits; the message says what would
        return found | {"memory": str(error), "fits": False}
    found |= {"memory": str(plan), "fits": True, "device_bytes": plan.device_peak, "host_bytes": plan.host}
    found |= {"seconds_per_step": plan.step_seconds, "seconds_to_pin": plan.pin_seconds}
    found["seconds_in_all"] = _seconds_in_all(plan, outline.settings)
    return found | {"flop_per_step": plan.step_flops}


def _seconds_in_all(plan: Any, settings: Settings) -> float | None:
    """Return the time of a plan's steps, of fewer passes or fewer tokens as it may be; None if it is unknown.

    Copies of weights, where they take the time, are as many as the passes.
    """
    if plan.step_seconds is None:
        return None
    copying = plan.step_seconds > 1.001 * plan.step_flops / plan.machine.flops
    steps = settings.passes / len(settings.kinds) if copying else settings.work / settings.step_work
    return (plan.pin_seconds or 0.0) + steps * plan.step_seconds


def _download(source: str | Path, task: str, loading: Loading) -> int | None:
    """Return the bytes that a load downloads; None if the hub does not say."""
    from ..pipelines.loading.diffusers_layout import FILES as OF_DIFFUSERS
    from ..pipelines.loading.official_layout import FILES as OFFICIAL
    from ..pipelines.loading.preparing import bytes_to_download

    if Path(source).exists():
        return 0
    preset = preset_of(loading.model, task)
    official = preset is not None and str(source).lower() != preset.repo.lower()
    return bytes_to_download(str(source), list(OFFICIAL if official else OF_DIFFUSERS), hub_options(loading))


# ---- in words ----


def _in_words(found: Mapping[str, Any]) -> dict[str, str]:
    words = {"model": found["model"], "from": found["source"], "download": _download_in_words(found)}
    if found["settings"] is None:
        return words | {"video": "unknown: nothing here tells the sizes of the models"}
    settings = found["settings"]
    words["video"] = settings["text"]
    passes = f"{settings['passes']} of a transformer, for each video"
    if settings["passes"] < settings["all_passes"]:
        passes = f"at most {passes}, in place of {settings['all_passes']}, by the cache {settings['cache']}"
    elif settings["cache"] is not None:
        passes = f"{passes}, less what the cache {settings['cache']} skips as it goes"
    if settings["sizes"]:
        passes += f", as much arithmetic as {settings['work']:.3g} at full size"
    words["passes"] = passes
    if settings["attention"] is not None:
        words["attention"] = f"{settings['attention']}; the time is with all of them"
    words["memory"] = f"by arithmetic, not measured: {found['memory']}"
    words["time"] = _time_in_words(found)
    if "output" in found:
        words["to"] = found["output"]
    return words


def _download_in_words(found: Mapping[str, Any]) -> str:
    from huggingface_hub import constants

    from ..checkpoints.converting.writing import free_bytes

    if found["here"]:
        return "nothing: it is on this machine"
    place = Path(constants.HF_HUB_CACHE)
    free = f"{place}, where {free_bytes(existing(place)) / 1e9:.3g} GB are free"
    if found["download_bytes"] is None:
        preset = preset_of(found["model"], "t2v")
        size = f"; its weights have {preset.gigabytes:g} GB in bfloat16" if preset else ""
        return f"unknown, as the hub does not answer{size}; to {free}"
    return f"{found['download_bytes'] / 1e9:.3g} GB that are not here yet, to {free}"


def _time_in_words(found: Mapping[str, Any]) -> str:
    if not found["fits"]:
        return "unknown"
    seconds, steps = found["seconds_per_step"], found["settings"]["steps"]
    if seconds is None:
        work = f"by arithmetic {found['flop_per_step'] / 1e12:,.0f} TFLOP a step, for {steps} steps"
        return f"unknown, as the GPU is not here; {work}"
    once = found["seconds_to_pin"] or 0.0
    pinned = f" after {once:.3g} s to pin the weights" if once else ""
    total = f"{found['seconds_in_all']:.3g} s for {steps} steps"
    return f"by arithmetic, not measured: {seconds:.3g} s a step, {total}{pinned}"


# ---- what a plan is for ----


def outlined_task(loading: Loading) -> tuple[str, Any]:
    """Return a checkpoint's task, text to video if it has both, and its pipeline without weights."""
    from .outline import outlined

    errors = []
    for task in PIPELINES:
        try:
            return task, outlined(task, loading)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _with_inputs(task: str, call: Mapping[str, Any], pipe: Any) -> dict[str, Any]:
    """Return a call with a prompt, and with an image where the checkpoint needs one."""
    if task == "t2v" or pipe is None:
        return {"prompt": "", **call}
    from PIL import Image

    preset = pipe.preset
    size = call.get("width", preset.width), call.get("height", preset.height)
    images = {"image": Image.new("RGB", size)}
    if preset.two_frames:
        images["last_image"] = images["image"]
    return {"prompt": "", **images, **call}
