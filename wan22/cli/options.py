"""The options of the commands, each declared once, and how a command gets them."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from typer import Argument, Option
from typer.models import OptionInfo

from ..checks import RENAMED
from ..presets import PRESETS, Preset
from ..training.config import TrainConfig
from .signatures import CHANNELS, Numbers, call_arguments, described_in

# ---- a call's arguments: the pipelines declare and describe them, a command line says some differently ----

POSITIONAL = ("image", "prompt")
FLAGS = {
    "num_frames": ("--num-frames", "--frames"),
    "num_inference_steps": ("--steps", "--num-inference-steps"),
    "guidance_scale": ("--guidance-scale", "-g"),
    "num_videos_per_prompt": ("--num-videos", "-n"),
}
HELP = {
    "prompt": "What the video shows.",
    "image": "The first frame: file or URL.",
    "fit": "How an image of another aspect is fitted: crop, pad or stretch.",
    "seed": "Seed of the first video's noise; default is drawn and printed.",
    "guidance_scale": "Scale of the high-noise expert, and of the other unless --guidance-scale-2 is given; "
    "1 turns guidance off. Or one for each step: 4,4,3",
    "guidance": "Formula: cfg-zero*, apg, tcfg, mambo-g, rescale, slg, gated or nag; or JSON with its "
    'settings: {"name": "apg", "eta": 0.5}',
    "guidance_interval": "Shares of the steps between which guidance is on: 0.2,0.9",
    "sigmas": "Noise levels instead of steps and shift: 1.0,0.8,0.3",
    "timesteps": "Timesteps instead of steps and shift: 1000,750,500",
    "attention_kwargs": 'JSON: {"scale": 0.5} multiplies the strengths of all LoRAs by 0.5.',
    "attention": "What self-attention leaves out: radial or sparge; or JSON with settings: "
    '{"method": "radial", "decay": 0.5}',
    "cache": "Skip passes: easy, mag or taylor, with :low, :medium or :high error; or a file of ratios.",
    "resolution_schedule": "Fewer tokens for a while: coarse-to-fine or u; or JSON with scales of both sides "
    "and the shares of the steps at which they end: [[0.75, 0.5]]",
    "distilled": "Settings of distilled weights: lightning-4, lightning-3-phase, rcm-4, rcm-4-ode, turbo, "
    "turbo-ode or fastwan-3; or JSON with a table of your own.",
    "preview": "File that shows the video while it is made: .png, .gif, .webp.",
    "preview_decoder": "Tiny autoencoder for finer previews: file of taew2_1 or taew2_2.",
}
# Arguments whose default is the checkpoint's own: the entry of that name in its preset.
OF_THE_CHECKPOINT = (
    *("height", "width", "num_frames", "num_inference_steps"),
    *("flow_shift", "guidance_scale", "guidance_scale_2"),
)


class CallOptions:
    """Options for the arguments of a pipeline's call.

    `task` is "t2v" or "i2v"; `names` default to all that can be typed; `positional` have no flag; `releases`,
    whose defaults the help has, are those for the task.
    """

    def __init__(
        self,
        task: str,
        names: Sequence[str] = (),
        positional: Sequence[str] = POSITIONAL,
        releases: Iterable[Preset] | None = None,
    ) -> None:
        known = call_arguments(task)
        if releases is None:
            releases = [preset for preset in PRESETS if preset.in_channels in CHANNELS[task]]
        self.types = {name: known[name].type for name in names or known}
        self.parameters = []
        for name, kind in self.types.items():
            help = _in_flags(HELP.get(name, known[name].help), known) + _defaults(name, releases)
            typed: Any = str if kind in _RULES else kind
            if name in positional:
                self.parameters.append(_parameter(name, Annotated[typed, Argument(help=help)]))
            else:
                option = Option(*flags_of(name), help=help, rich_help_panel="Video")
                self.parameters.append(_parameter(name, Annotated[typed | None, option], None))
        for name in (old for old, new in RENAMED.items() if new in self.types):
            self.parameters.append(_parameter(name, Annotated[str | None, Option(hidden=True)], None))

    def collect(self, **values: Any) -> dict[str, Any]:
        """Return the arguments that are given; raise ValueError if one cannot be parsed."""
        given = {name: value for name, value in values.items() if value is not None}
        for name in RENAMED.keys() & given:
            raise ValueError(f"{flags_of(name)[0]} is called {flags_of(RENAMED[name])[0]} now")
        return {name: _parsed(flags_of(name)[0], value, self.types[name]) for name, value in given.items()}


class FieldOptions:
    """Options for some fields of one of the dataclasses below; the others keep their defaults."""

    def __init__(self, cls: Any, names: Sequence[str]) -> None:
        self.parameters = [parameter for parameter in _fields(cls) if parameter.name in names]
        self.collect = cls


# Settings of a training that have a short flag.
SHORT = {"model": ("--model", "-m"), "output": ("--output", "-o")}


class TrainingOptions:
    """Options for the settings of a training, which the class that has them declares and describes."""

    def __init__(self) -> None:
        described = described_in(inspect.getdoc(TrainConfig) or "")
        self.parameters = []
        for item in fields(TrainConfig):
            flags = SHORT.get(item.name, flags_of(item.name))
            if item.type is bool:
                flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
            help = _in_flags(described[item.name], described)
            if item.default not in (MISSING, None, False):
                default = flags[0].partition("/")[0] if item.default is True else item.default
                help += f" Default: {default}."
            shown: dict[str, Any] = {"metavar": ""} if item.type is bool else {}
            option = Option(*flags, help=help, rich_help_panel="Training", show_default=False, **shown)
            kind: Any = item.type
            self.parameters.append(_parameter(item.name, Annotated[kind | None, option], None))

    def collect(self, **values: Any) -> dict[str, Any]:
        """Return the settings that are given."""
        return {name: value for name, value in values.items() if value is not None}


def flags_of(name: str) -> tuple[str, ...]:
    """Return the flags of an argument or a field."""
    return FLAGS.get(name, (f"--{name.replace('_', '-')}",))


def _in_flags(text: str, names: Iterable[str]) -> str:
    """Return a docstring's entry as help: a sentence that names flags."""
    for name in names:
        if "_" in name:
            text = re.sub(rf"\b{name}\b", flags_of(name)[0], text)
    return (text[0].upper() + text[1:]).replace("[", "\\[")


def _defaults(name: str, releases: Iterable[Preset]) -> str:
    """Return what a help text adds about the released checkpoints' values of an argument."""
    if name not in OF_THE_CHECKPOINT:
        return ""
    values: dict[Any, list[str]] = {}
    for preset in releases:
        if preset.repo and (value := getattr(preset, name)) is not None:
            values.setdefault(value, []).append(preset.name.removeprefix("Wan2.2-").removeprefix("Wan"))
    return " Default: " + "; ".join(f"{value:g} ({', '.join(names)})" for value, names in values.items())


# What is typed as text, and how.
_RULES = {
    list: "numbers with commas between: 1.0,0.5",
    Numbers: "a number, or one for each step with commas between: 4,4,3",
    dict: "a JSON object, such as '{\"scale\": 0.5}'",
}


def _parsed(flag: str, value: Any, kind: type) -> Any:
    if kind not in _RULES:
        return value
    try:
        parsed = json.loads(value) if kind is dict else [float(part) for part in value.split(",")]
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict if kind is dict else list):
        raise ValueError(f"{flag} {value} must be {_RULES[kind]}")
    return parsed[0] if kind is Numbers and len(parsed) == 1 else parsed


# ---- the other options ----


def _option(panel: str, help: str, *flags: str, default: Any = None) -> Any:
    info = {"flags": flags, "help": help, "rich_help_panel": panel, "show_default": False}
    return field(default=default, metadata=info)


_model, _saving = partial(_option, "Model"), partial(_option, "Saving")
_printing, _clips = partial(_option, "Output"), partial(_option, "Clips")


@dataclass(frozen=True)
class Loading:
    """How a pipeline is loaded and set up."""

    model: str | None = _model(
        "Name (see `wan22 models`), hub repository, folder, or file of the only or the high-noise "
        "transformer. Default: the miniature inside wan22, which draws coloured shapes.",
        *("--model", "-m"),
    )
    dtype: Literal["stored", "bf16", "fp16", "fp32"] | None = _model(
        "Default: bf16 on a GPU, as in the official script; on a CPU as stored, the miniature in fp32."
    )
    device: str | None = _model("cuda, cuda:1, cpu, mps; default: the best there is.")
    memory: str | None = _model('GPU memory to use: "12GB", which 12 is short for, or "auto": what is free.')
    quantize: str | None = _model(
        "fp8, fp8_dynamic or int8, of both experts or of one (fp8:low), but for first and last blocks "
        "(fp8:keep=1,2): changes the result."
    )
    prepare: Literal["bf16", "fp8"] | None = _model(
        "Convert it once, into the cache, and load it from there; see `wan22 prepare`."
    )
    low: str | None = _model("Low-noise transformer, beside a --model file.")
    vae: str | None = _model("VAE, beside a --model file.")
    text_encoder: str | None = _model("Text encoder, beside a --model file.")
    tokenizer: str | None = _model("Folder or repository, beside a --model file: google/umt5-xxl.")
    revision: str | None = _model("Commit or branch of a repository.")
    lora: list[str] | None = _model(  # noqa: RUF009 (a dataclasses.field)
        "LoRA for all transformers: file, folder or repository; =0.8 after it is its strength. Repeatable."
    )
    lora_high: str | None = _model("LoRA for the high-noise expert.")
    lora_low: str | None = _model("LoRA for the low-noise expert.")
    parallel: str | None = _model('Under torchrun: "auto", the default, or cfg=2,ulysses=4,fsdp=true.')
    attention_backend: str | None = _model("Name of the attention kernel.")
    accelerate: bool = _model("Faster; results change by rounding.", default=False)
    compile: bool = _model("Compile the models first.", default=False)
    tiling: bool = _model("VAE in blended tiles: changes the result.", default=False)


@dataclass(frozen=True)
class Target:
    """Which file a video is written to, if it is made at all."""

    output: Path | None = _saving(  # noqa: RUF009 (a dataclasses.field)
        "File: .mp4, .mov, .mkv, .webm, .gif, .webp, .png, .npy. Default: named after the prompt.",
        "--output",
        "-o",
    )
    overwrite: bool = _saving("Replace existing files.", default=False)
    dry_run: bool = _saving("Check all, print what would be done, and stop.", default=False)


@dataclass(frozen=True)
class Saving:
    """How videos are written and reported."""

    quality: int | None = _saving("1 to 100, for videos and .webp; default 90.")
    crf: int | None = _saving("For videos, instead of quality: the codec's scale, 0 to 51; .webm: to 63.")
    contact_sheet: bool = _saving("Also save a picture of some frames.", default=False)
    no_recipe: bool = _saving("Leave the recipe out of the file.", default=False)
    no_prompt: bool = _saving("Leave the prompt out of the file, its name, and the picture.", default=False)


@dataclass(frozen=True)
class Clips:
    """How clips for training are made of files; fields of training's DataConfig, and how they are stored."""

    resolution: str | None = _clips("Area of the clips, as 832x480. Default: the checkpoint's.")
    frames: str | None = _clips("Lengths: 17,33,81. A video gives the longest it has. Default: any.")
    extraction: Literal["head", "chunk", "slide", "uniform", "full"] | None = _clips(
        "Which parts of a video: its first frames (default), one after the other, one every --stride frames, "
        "--samples evenly, or all of it."
    )
    every_length: bool = _clips("Clips of each length of --frames.", default=False)
    stride: int | None = _clips("Frames from one clip to the next, with --extraction slide.")
    samples: int | None = _clips("Clips of a video, with --extraction uniform.")
    max_frames: int | None = _clips("Most frames, with --extraction full; default 129.")
    keep_fps: bool = _clips("Use every frame, whatever the rate of the file.", default=False)
    source_fps: float | None = _clips("Frames per second of the files, in place of what they say.")
    no_buckets: bool = _clips("Crop all to --resolution, whatever their aspect.", default=False)
    no_upscale: bool = _clips("Do not enlarge small files.", default=False)
    repeats: int | None = _clips("How often an epoch has each clip; default 1.")
    caption_extension: str | None = _clips("Ending of the caption files; default .txt.")
    default_caption: str | None = _clips("Caption of files that have none.")
    skip: bool = _clips("Leave out files that cannot be used, with a warning.", default=False)
    latents_dtype: Literal["float32", "bfloat16"] = _clips(
        "bfloat16 takes half the room, and is less exact.", default="float32"
    )


@dataclass(frozen=True)
class Output:
    """What a command prints beside its work; every command has these."""

    as_json: bool = _printing("Print the result as JSON, and nothing else.", "--json", default=False)
    quiet: bool = _printing("Print results, warnings and errors only.", "--quiet", "-q", default=False)
    verbose: bool = _printing("Print what the parts of wan22 log.", "--verbose", "-v", default=False)

    @property
    def draws_bars(self) -> bool:
        """Whether progress is drawn: where somebody sees it change, and not in a log."""
        return sys.stderr.isatty() and not self.quiet and not self.as_json


# ---- commands ----


GROUPS = (CallOptions, FieldOptions, TrainingOptions)


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a command that stands for several options into these options.

    Such a parameter is annotated with one of the dataclasses above, or with one of the classes of options.
    """
    hints: dict[str, Any] = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[list[inspect.Parameter], Callable[..., Any]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        some = [
            extra
            for extra in get_args(hint)
            if isinstance(extra, CallOptions | FieldOptions | TrainingOptions)
        ]
        if some:
            groups[name] = some[0].parameters, some[0].collect
        elif isinstance(hint, type) and is_dataclass(hint):
            groups[name] = _fields(hint), hint
        else:
            alone = _parameter(name, hint, parameter.default)
            groups[name] = [alone], lambda **value: next(iter(value.values()))

    @wraps(function)
    def command(**values: Any) -> None:
        arguments = {}
        for name, (options, collect) in groups.items():
            arguments[name] = collect(**{option.name: values[option.name] for option in options})
        function(**arguments)

    parameters = [parameter for options, _ in groups.values() for parameter in options]
    command.flags = {p.name: flag for p in parameters if (flag := _flag(p))}  # type: ignore[attr-defined]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _flag(parameter: inspect.Parameter) -> str | None:
    """Return the flag by which messages name an option; None for what has none."""
    info = get_args(parameter.annotation)[-1]
    if not isinstance(info, OptionInfo):
        return None
    given = [
        info.default,
        *(info.param_decls or ()),
    ]  # in an annotation, the first flag is where a default was
    flags = [flag for flag in given if isinstance(flag, str) and flag[:2] == "--"]
    return (*flags, *flags_of(parameter.name))[0]


def _fields(cls: Any) -> list[inspect.Parameter]:
    """Return a dataclass's fields as options; a bool is a flag that is given or not."""
    parameters = []
    for item in fields(cls):
        info = dict(item.metadata)
        if item.type is bool:
            info["metavar"] = ""
        option = Option(*(info.pop("flags") or flags_of(item.name)), **info)
        parameters.append(_parameter(item.name, Annotated[item.type, option], item.default))
    return parameters


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
