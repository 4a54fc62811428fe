"""The commands: each takes its options and hands them on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup

from ..presets import PRESETS
from .options import (
    CallOptions,
    Clips,
    FieldOptions,
    Loading,
    Output,
    Saving,
    Target,
    TrainingOptions,
    expanded,
)
from .reporting import print_lines, report_errors


class Help:
    """A command whose --help has no type beside it, as other flags have none."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option that prints the help."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class Command(Help, TyperCommand):
    """One command."""


class Group(Help, TyperGroup):
    """All commands."""


app = typer.Typer(
    cls=Group,
    help="Make videos with Wan 2.1 and 2.2.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Call = dict[str, Any]
# Arguments of the call that may take the place of a recipe's.
REPLACED = ("image", "last_image", "prompt", "negative_prompt", "seed")
# What a plan depends on.
PLANNED = (
    *("height", "width", "num_frames", "num_inference_steps", "num_videos_per_prompt"),
    *("guidance_scale", "guidance", "guidance_interval", "cache", "attention", "fast"),
    "resolution_schedule",
)
PLACED = ("dtype", "device", "memory", "quantize", "revision")
ENCODING = ("model", "dtype", "device", "revision")
Yes = Annotated[bool, Option("--yes", "-y", metavar="", help="Download and write without asking.")]
DryRun = Annotated[
    bool, Option("--dry-run", metavar="", help="Check all, print what would be done, and stop.")
]
Revision = Annotated[str | None, Option(help="Commit or branch of a repository.")]


def command(function: Callable[..., None]) -> None:
    """Add a command; its groups of options become options, its errors one line."""
    app.command(cls=Command)(report_errors(expanded(function)))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, Option("--version", metavar="", help="Print the version and stop.")] = False,
) -> None:
    """Make videos with Wan 2.1 and 2.2."""
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit()


@command
def t2v(
    call: Annotated[Call, CallOptions("t2v")],
    loading: Loading,
    target: Target,
    saving: Saving,
    output: Output,
) -> None:
    """Make a video of a prompt.

    wan22 t2v "a red circle moves to the right on a blue background"

    wan22 t2v "two cats box on a stage" --model Wan2.2-T2V-A14B --memory 24GB -o cats.mp4

    torchrun --nproc-per-node=4 -m wan22.cli t2v "two cats box on a stage" --model Wan2.2-T2V-A14B
    """
    from .running import generate

    generate("t2v", call, loading, target, saving, output)


@command
def i2v(
    call: Annotated[Call, CallOptions("i2v")],
    loading: Loading,
    target: Target,
    saving: Saving,
    output: Output,
) -> None:
    """Make a video that starts from an image.

    wan22 i2v shapes.png "a white triangle moves to the left on a blue background"

    wan22 i2v cat.jpg "the cat yawns" --model Wan2.2-I2V-A14B --memory 24GB --last-image asleep.jpg
    """
    from .running import generate

    generate("i2v", call, loading, target, saving, output)


@command
def batch(
    file: Annotated[
        Path, Argument(help="One item a line: a prompt (.txt), or JSON with prompt, image, seed, …")
    ],
    folder: Annotated[Path, Option("--output", "-o", help="Folder for the videos and results.jsonl.")],
    loading: Loading,
    saving: Saving,
    output: Output,
    ending: Annotated[str, Option(help="Format of the videos.")] = ".mp4",
    dry_run: DryRun = False,
) -> None:
    """Make a video of each line of a file; finished ones are skipped, failures are recorded.

    wan22 batch prompts.jsonl -o videos

    where a line is {"prompt": "a red circle grows", "seed": 1, "num_inference_steps": 10, "name": "circle"}
    """
    from .batches import run_batch

    run_batch(file, folder, ending, loading, saving, output, dry_run)


@command
def reproduce(
    file: Annotated[Path, Argument(help="Video that was saved with its recipe.")],
    replaced: Annotated[Call, CallOptions("i2v", REPLACED, positional=())],
    loading: Loading,
    target: Target,
    saving: Saving,
    output: Output,
    allow_download: Annotated[
        bool,
        Option("--allow-download", metavar="", help="Load what the recipe names on the hub and on the web."),
    ] = False,
    anyway: Annotated[
        bool,
        Option("--anyway", metavar="", help="Make a video known to be another, too, with warnings."),
    ] = False,
) -> None:
    """Make a video again from the recipe in its file.

    wan22 reproduce cats.mp4 -o again.mp4

    Anybody may have written the file. What it names outside of wan22 is loaded if you agree when asked,

    or give it yourself: wan22 reproduce cats.mp4 --model Wan2.2-T2V-A14B --lora style.safetensors
    """
    from .reproduce import reproduce_file

    reproduce_file(file, replaced, loading, target, saving, output, allow_download, anyway)


@command
def convert(
    source: Annotated[str, Argument(help="Folder or repository in any layout, or a weight file.")],
    destination: Annotated[Path, Argument(help="Folder, or .safetensors file, that is not there yet.")],
    to: Annotated[str, Option(help="diffusers, official, or single-file.")],
    output: Output,
    dtype: Annotated[str | None, Option(help="bf16, fp16 or fp32; default: as stored.")] = None,
    shard_size: Annotated[str, Option(help="Largest file.")] = "5GB",
    attention_head_dim: Annotated[int | None, Option(help="If it is not 128.")] = None,
    dry_run: DryRun = False,
    verify: Annotated[
        bool, Option("--verify", metavar="", help="Read the result, compare every tensor.")
    ] = False,
) -> None:
    """Convert a checkpoint, or one model's file, to another layout or dtype; interrupted, it goes on.

    wan22 convert Wan2.2-T2V-A14B Wan2.2-T2V-A14B-Diffusers --to diffusers
    """
    from ..checkpoints.converting import convert as conversion

    arguments: dict[str, Any] = {"to": to, "dtype": dtype, "shard_size": shard_size}
    arguments["attention_head_dim"] = attention_head_dim
    if dry_run:
        lines = list(conversion.plan(source, destination, **arguments).describe())
        print_lines(json.dumps({"plan": lines}) if output.as_json else "\n".join(lines))
        return
    done = conversion.convert(source, destination, **arguments, verify=verify, progress=output.draws_bars)
    result = {"destination": str(destination), "report": str(done)}
    print_lines(json.dumps(result) if output.as_json else done)


@command
def prepare(
    model: Annotated[str, Argument(help="Name (see `wan22 models`), repository, folder, or weight file.")],
    output: Output,
    dtype: Annotated[
        str, Option(help="bf16; or fp8, as --quantize fp8 makes the transformers: changes the result.")
    ] = "bf16",
    revision: Revision = None,
    yes: Yes = False,
) -> None:
    """Convert a checkpoint once, so that later loads in bf16 need not: they find it by themselves.

    wan22 prepare Wan2.2-T2V-A14B

    wan22 prepare Wan2.2-T2V-A14B --dtype fp8 --yes

    Sizes are shown and confirmed first. Models go to $WAN22_CACHE, or the assets of Hugging Face's cache.

    The source stays, and nothing is deleted; interrupted, it goes on.
    """
    from .preparing import prepare_model

    prepare_model(model, dtype, revision, yes, output)


@command
def cache(
    data: Annotated[
        str, Argument(help="Folder of videos and pictures with captions, .jsonl or .csv list, or .toml file.")
    ],
    loading: Annotated[Loading, FieldOptions(Loading, ENCODING)],
    clips: Clips,
    output: Output,
    folder: Annotated[
        Path | None, Option("--output", "-o", help="Folder for the clips; default: DATA-cache.")
    ] = None,
    prune: Annotated[
        bool, Option("--prune", metavar="", help="Remove files of earlier runs that no clip needs any more.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Encode a data set for training; what is there already is kept, so that it goes on when interrupted.

    wan22 cache clips --resolution 64x64 --frames 5,17 -o clips-cache

    wan22 cache clips.toml --dry-run

    All files are looked at first. VAE and text encoder are loaded one after the other, and no transformer.
    """
    from .caching import cache_data

    cache_data(data, folder, loading, clips, dry_run, prune, output)


@command
def plan(
    model: Annotated[
        str, Argument(help="Name (see `wan22 models`), repository, folder, or file with all models.")
    ],
    call: Annotated[Call, CallOptions("t2v", PLANNED, releases=PRESETS)],
    loading: Annotated[Loading, FieldOptions(Loading, PLACED)],
    output: Output,
) -> None:
    """Print what a video takes: passes, memory, download, time; nothing is downloaded or loaded.

    wan22 plan Wan2.2-T2V-A14B --memory 24

    wan22 plan Wan2.2-TI2V-5B --frames 49 --steps 30

    The memory is that of a GPU here, or of one that --memory describes, or else this machine's.
    """
    from .planning import plan_model

    plan_model(model, call, loading, output)


@command
def train(
    settings: Annotated[Call, TrainingOptions()],
    output: Output,
    file: Annotated[Path | None, Argument(help="TOML with settings, by the names of the options.")] = None,
    resume: Annotated[
        bool, Option("--resume", metavar="", help="Go on from the last state in the output folder.")
    ] = False,
    show_timesteps: Annotated[
        bool, Option("--show-timesteps", metavar="", help="Draw the distribution of noise levels, and stop.")
    ] = False,
) -> None:
    """Train a LoRA on clips that `wan22 cache` has encoded; Ctrl-C saves, and --resume goes on.

    wan22 train --model Wan2.2-T2V-A14B --data cached --output runs/style

    wan22 train style.toml --steps 1000 --resume

    accelerate launch --num-processes 2 -m wan22.cli train style.toml
    """
    from .training import show_noise_levels, train_loras

    if show_timesteps:
        show_noise_levels(file, settings, output)
    else:
        train_loras(file, settings, resume, output)


@command
def download(
    model: Annotated[str, Argument(help="Name (see `wan22 models`) or repository.")],
    output: Output,
    revision: Revision = None,
    yes: Yes = False,
) -> None:
    """Download what a load of a checkpoint needs, and no more; interrupted, it goes on.

    wan22 download Wan2.2-TI2V-5B

    The size is shown and confirmed first. It goes to Hugging Face's cache, which HF_HOME can move.
    """
    from .downloading import download_model

    download_model(model, revision, yes, output)


@command
def doctor(output: Output) -> None:
    """Print what this machine has: versions, device, attention kernels, ffmpeg, memory, disks.

    wan22 doctor
    """
    from .doctor import print_findings

    print_findings(output)


@command
def info(
    file: Annotated[str, Argument(help="Video or picture of wan22, weight file, folder, or repository.")],
    output: Output,
    revision: Revision = None,
) -> None:
    """Print the recipe in a video, or what a checkpoint is and what loads it.

    wan22 info cats.mp4

    wan22 info high_noise_model.safetensors
    """
    from .info import describe

    describe(file, revision, output)


@command
def models(output: Output) -> None:
    """List the checkpoints that are known by name.

    wan22 models
    """
    from .info import list_models

    list_models(output)
