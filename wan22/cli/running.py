"""Load the pipeline that a command asks for, run a call, save the result; Ctrl-C ends with a step."""

import difflib
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ..accel.parallel.environment import is_first, launched, rank
from ..presets import PRESETS

# Results go to stdout, all else to stderr: what a script reads is never mixed with what a person does.
err = Console(stderr=True, highlight=False, soft_wrap=True)
INTERRUPTED = 130
# What ranks beside the first wait before they tell of an error: if the first has it, too, or caused it, its
# end ends them in this time.
GRACE_SECONDS = 2.0
LOADING = (
    *("model", "low", "vae", "text_encoder", "tokenizer", "revision", "dtype", "device", "memory"),
    *("quantize", "compile", "accelerate", "attention", "lora", "lora_high", "lora_low", "tiling"),
    "parallel",
)
SAVING = ("output", "overwrite", "quality", "crf", "contact_sheet", "as_json", "quiet")


@dataclass
class Result:
    """What a command made.

    Args:
        files: that were written.
        recipe: as plain values.
        seconds: that loading, making and saving took.
        stopped: whether Ctrl-C ended it.
    """

    files: list[str]
    recipe: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    stopped: bool = False


def told(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command's errors end in one line, and in its exit code: 1, or 130 after Ctrl-C."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            fail("interrupted", kwargs.get("as_json", False), INTERRUPTED)
        except typer.Exit:  # a RuntimeError, too
            raise
        except (OSError, ValueError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
            fail(line_of(error), kwargs.get("as_json", False), 1)

    return run


def line_of(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (
        text
        if isinstance(error, ValueError | FileNotFoundError | FileExistsError)
        else (text if type(error).__name__ in text else f"{type(error).__name__}: {text}")
    )


def fail(message: str, as_json: bool, code: int) -> None:
    """End with a message; a rank at once, whatever it shares with others."""
    if not is_first():
        time.sleep(GRACE_SECONDS)
    if as_json and is_first():
        print(json.dumps({"error": message}))
    err.print(f"[red]error{'' if is_first() else f' of rank {rank()}'}:[/red] {_plain(message)}")
    if launched():
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


def say(message: str, quiet: bool = False) -> None:
    """Tell a person something, on the first rank."""
    if not quiet and is_first():
        err.print(_plain(message))


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


# ---- loading ----


def load(task: str, options: Mapping[str, Any], quiet: bool, loras: Sequence[Mapping[str, Any]] = ()) -> Any:
    """Load a pipeline and set it up; as several ranks, they share its work.

    Args:
        task: "t2v" or "i2v".
        options: those named in LOADING.
        quiet: whether to show no progress.
        loras: arguments of load_lora_weights, beside those of the options.

    Returns: the pipeline.
    """
    import torch

    from ..accel.parallel import processes
    from ..assets import tiny_checkpoint
    from ..pipelines.i2v import WanI2VPipeline
    from ..pipelines.t2v import WanT2VPipeline

    cls: Any = {"t2v": WanT2VPipeline, "i2v": WanI2VPipeline}[task]
    source, file = resolve(options["model"], task)
    if source is None:
        source = tiny_checkpoint(task)
        say(f"no --model given: this is tiny-{task}, the miniature inside wan22, of coloured shapes", quiet)
    if quiet:
        _silence_loading()
    shares = sharing(options.get("parallel"))
    if launched():
        if options["device"] is not None:
            raise ValueError(f"--device {options['device']}: each rank has a device of its own; leave it out")
        device = str(processes.own_device())
    else:
        device = check_device(options["device"] or best_device())
    arguments = {name: options.get(name) for name in ("memory", "quantize")}
    arguments |= {"dtype": _dtype(options["dtype"], options["model"], device)}
    arguments |= {"parallel": shares if launched() else None, "loras": [*_loras(options), *loras]}
    if file:
        parts = {name: options[name] for name in ("vae", "text_encoder", "tokenizer")}
        if missing := [f"--{n.replace('_', '-')}" for n, part in parts.items() if part is None]:
            raise ValueError(f"{source} is one file; {', '.join(missing)} must be given, too")
        if options.get("revision") is not None:
            raise ValueError("--revision is for repositories")
        pipe = cls.from_single_file(source, options["low"], **parts, **arguments)
    else:
        if given := [n for n in ("low", "vae", "text_encoder", "tokenizer") if options.get(n) is not None]:
            raise ValueError(f"--{given[0].replace('_', '-')} goes with a --model that is a file")
        hub = {} if options.get("revision") is None else {"revision": options["revision"]}
        pipe = cls.from_pretrained(source, **hub, **arguments)
    if quiet:
        pipe.set_progress_bar_config(disable=True)
    if options["tiling"]:
        pipe.vae.enable_tiling()
    if not launched() and options["memory"] is None and device != "cpu":
        pipe.to(torch.device(device))
    if options["accelerate"]:
        pipe.accelerate()
    if options["attention"] is not None:
        pipe.set_attention_backend(options["attention"])
    if options["compile"]:
        pipe.compile()
    return pipe


def resolve(model: str | None, task: str) -> tuple[Any, bool]:
    """Return what to load for `--model`, None for the miniature, and whether it is a single file.

    Raises:
        ValueError: it is neither a known name, a path, nor a repository's name.
    """
    if model is None:
        return None, False
    path = Path(model).expanduser()
    if path.exists():
        return path, path.is_file()
    names = {preset.name.lower(): preset for preset in PRESETS}
    if (preset := names.get(model.lower())) is not None:
        return (preset.repo, False) if preset.repo else (_tiny(preset.name), False)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model, False
    near = difflib.get_close_matches(model.lower(), names, 1, 0.4) or list(names)[:1]
    raise ValueError(
        f"there is no file or folder {model}, and no checkpoint of that name; say {names[near[0]].name}, or "
        "see `wan22 models`"
    )


def _tiny(name: str) -> Path:
    from ..assets import tiny_checkpoint

    return tiny_checkpoint(name.removeprefix("tiny-"))


def best_device() -> str:
    """Return the best device that there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> str:
    """Refuse a device that is not there, and return it otherwise.

    Raises:
        ValueError: it is not there.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} is not there; {best_device()} is") from error
    return name


def _dtype(choice: Any, model: str | None, device: str) -> Any:
    import torch

    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "stored": None}
    if choice is None:  # the miniature is as quick in float32 on a CPU, and exact
        return torch.float32 if model is None and device == "cpu" else None
    if isinstance(choice, Mapping):  # of a recipe, by component
        return {name: getattr(torch, dtype) for name, dtype in choice.items()}
    dtype = names[choice.value]
    # The VAE is the one part where half precision is seen; it stays as it is stored, or better.
    return dtype if dtype in (None, torch.float32) else {"default": dtype, "vae": torch.float32}


def _lora(text: str) -> tuple[str, float]:
    """Split "file=0.8"."""
    found = re.fullmatch(r"(.+)=([-+]?\d*\.?\d+)", text)
    if found is None or Path(text).expanduser().exists():
        return text, 1.0
    return found[1], float(found[2])


def _loras(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of load_lora_weights for each LoRA that is asked for."""
    for text in options["lora"] or ():
        name, strength = _lora(text)
        yield {"lora": name, "strength": strength}
    if pair := {slot: lora for slot in ("high", "low") if (lora := options[f"lora_{slot}"])}:
        yield pair


def sharing(text: str | None) -> dict[str, Any]:
    """Return the arguments of `parallelize` for "auto", None, or one such as "cfg=2,ulysses=4,fsdp=true".

    Raises:
        ValueError: it is none of these, or this process is alone.
    """
    if text is None:
        return {}
    if not launched():
        raise ValueError(
            f"--parallel {text} is for several ranks: torchrun --nproc-per-node=2 -m wan22.cli …"
        )
    values = {"true": True, "false": False} | {str(n): n for n in range(1, 1025)}
    shares = {}
    for part in text.split(",") if text != "auto" else ():
        name, _, value = part.partition("=")
        kind = {"cfg": int, "ulysses": int, "ring": int, "fsdp": bool, "vae": bool}.get(name)
        if kind is None or type(values.get(value)) is not kind:
            raise ValueError(
                f'--parallel {text} must be "auto", or some of cfg=2,ulysses=4,ring=2,fsdp=true,vae=false'
            )
        shares[name] = values[value]
    return shares


def _silence_loading() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for module in (diffusers_logging, transformers_logging):
        module.disable_progress_bar()


# ---- running and saving ----


def json_object(name: str, text: str | None) -> dict[str, Any] | None:
    """Return an object such as '{"scale": 0.5}'.

    Raises:
        ValueError: it is no such object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--{name} {text} must be a JSON object, such as '{{\"scale\": 0.5}}'")
    return found


def numbers(name: str, text: str | None) -> list[float] | None:
    """Return a list such as "1.0,0.5".

    Raises:
        ValueError: it is no such list.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} {text} must be numbers with commas between: 1.0,0.5") from None


@contextmanager
def ends_with_a_step(pipe: Any) -> Iterator[None]:
    """Let the first Ctrl-C end the run with its step, and the second one at once; ranks end at the first."""
    if launched():
        yield
        return
    stopped: list[bool] = []

    def interrupt(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        say("\nstopping after this step, with the video as it is; Ctrl-C once more stops at once")
        pipe.stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def make(pipe: Any, call: Mapping[str, Any], target: Path, saving: Mapping[str, Any]) -> Result:
    """Run a call and save what it returns.

    Args:
        pipe: the pipeline.
        call: its arguments.
        target: the file.
        saving: options named in SAVING.
    """
    from ..video import writers

    writers.check_ending(target)
    writers.check_quality(target, saving["quality"], saving["crf"])
    sheet = target.with_name(f"{target.stem}-sheet.png")
    if is_first():
        writers.numbered(target, call.get("num_videos_per_prompt") or 1, saving["overwrite"])
        if saving["contact_sheet"] and sheet.exists() and not saving["overwrite"]:
            raise FileExistsError(f"{sheet} exists; overwrite=True replaces it")
    start = time.perf_counter()
    with ends_with_a_step(pipe):
        video = pipe(**call)
    made = time.perf_counter()
    files = video.save(target, overwrite=saving["overwrite"], quality=saving["quality"], crf=saving["crf"])
    if saving["contact_sheet"] and is_first():
        video.contact_sheet().save(sheet)
        files.append(sheet)
    seconds = {"make": round(made - start, 2), "save": round(time.perf_counter() - made, 2)}
    stopped = video.recipe.steps_done is not None
    return Result([str(file) for file in files], video.recipe.to_dict(), seconds, stopped)


def name_of(prompt: str, folder: Path = Path(), ending: str = ".mp4") -> Path:
    """Return a file name made of a prompt that is not taken yet, by one video or by several."""
    from ..video.writers import existing_files, numbered_name

    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60].strip("-") or "video"
    names = (folder / f"{words}{'' if i == 1 else f'-{i}'}{ending}" for i in itertools.count(1))
    return next(path for path in names if not any(map(existing_files, (path, numbered_name(path, 0)))))


def report(result: Result, as_json: bool) -> None:
    """Print what was made, for a script or for a person, on the first rank."""
    if not is_first():
        pass
    elif as_json:
        print(json.dumps(vars(result)))
    else:
        for file in result.files:
            print(file)
        seeds = ", ".join(map(str, result.recipe["seeds"]))
        spent = ", ".join(f"{what} {value:.1f} s" for what, value in result.seconds.items())
        say("; ".join(filter(None, (f"seed {seeds}", spent))))
    if result.stopped:
        say(f"stopped after step {result.recipe['steps_done']} of {result.recipe['num_inference_steps']}")
        sys.stdout.flush()
        raise typer.Exit(INTERRUPTED)
