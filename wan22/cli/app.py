"""The commands: each takes its options and hands them on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from .options import CallOptions, Loading, Saving, Target, expanded
from .reporting import print_lines, report_errors

app = typer.Typer(
    help="Make videos with Wan 2.1 and 2.2.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Call = dict[str, Any]
# Arguments of the call that may take the place of a recipe's.
REPLACED = ("image", "last_image", "prompt", "negative_prompt", "seed")
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]


def command(function: Callable[..., None]) -> None:
    """Add a command; its groups of options become options, its errors one line."""
    app.command()(report_errors(expanded(function)))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Make videos with Wan 2.1 and 2.2."""
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit()


@command
def t2v(call: Annotated[Call, CallOptions("t2v")], loading: Loading, target: Target, saving: Saving) -> None:
    """Make a video of a prompt.

    wan22 t2v "a red circle moves to the right on a blue background"

    wan22 t2v "two cats box on a stage" --model Wan2.2-T2V-A14B --memory 24GB -o cats.mp4

    torchrun --nproc-per-node=4 -m wan22.cli t2v "two cats box on a stage" --model Wan2.2-T2V-A14B
    """
    from .running import generate

    generate("t2v", call, loading, target, saving)


@command
def i2v(call: Annotated[Call, CallOptions("i2v")], loading: Loading, target: Target, saving: Saving) -> None:
    """Make a video that starts from an image.

    wan22 i2v shapes.png "a white triangle moves to the left on a blue background"

    wan22 i2v cat.jpg "the cat yawns" --model Wan2.2-I2V-A14B --memory 24GB --last-image asleep.jpg
    """
    from .running import generate

    generate("i2v", call, loading, target, saving)


@command
def batch(
    file: Annotated[
        Path, Argument(help="One item a line: a prompt (.txt), or JSON with prompt, image, seed, …")
    ],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the videos and results.jsonl.")],
    loading: Loading,
    saving: Saving,
    ending: Annotated[str, Option(help="Format of the videos.")] = ".mp4",
) -> None:
    """Make a video of each line of a file; finished ones are skipped, failures are recorded.

    wan22 batch prompts.jsonl -o videos

    where a line is {"prompt": "a red circle grows", "seed": 1, "num_inference_steps": 10, "name": "circle"}
    """
    from .batches import run_batch

    run_batch(file, output, ending, loading, saving)


@command
def reproduce(
    file: Annotated[Path, Argument(help="Video that was saved with its recipe.")],
    replaced: Annotated[Call, CallOptions("i2v", REPLACED, positional=())],
    loading: Loading,
    target: Target,
    saving: Saving,
    allow_download: Annotated[
        bool, Option("--allow-download", help="Load what the recipe names on the hub and on the web.")
    ] = False,
    anyway: Annotated[
        bool, Option("--anyway", help="Make a video also where it is known to be another, with warnings.")
    ] = False,
) -> None:
    """Make a video again from the recipe in its file.

    wan22 reproduce cats.mp4 -o again.mp4

    Anybody may have written the file. What it names outside of wan22 is loaded if you agree when asked,

    or give it yourself: wan22 reproduce cats.mp4 --model Wan2.2-T2V-A14B --lora style.safetensors
    """
    from .reproduce import reproduce_file

    reproduce_file(file, replaced, loading, target, saving, allow_download, anyway)


@command
def convert(
    source: Annotated[str, Argument(help="Folder or repository in any layout, or a weight file.")],
    destination: Annotated[Path, Argument(help="Folder, or .safetensors file, that is not there yet.")],
    to: Annotated[str, Option(help="diffusers, official, or single-file.")],
    dtype: Annotated[str | None, Option(help="bf16, fp16 or fp32; default: as stored.")] = None,
    shard_size: Annotated[str, Option(help="Largest file.")] = "5GB",
    attention_head_dim: Annotated[int | None, Option(help="If it is not 128.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would be written.")] = False,
    verify: Annotated[bool, Option("--verify", help="Read the result, compare every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint, or one model's file, to another layout or dtype; interrupted, it goes on.

    wan22 convert Wan2.2-T2V-A14B Wan2.2-T2V-A14B-Diffusers --to diffusers
    """
    from ..checkpoints.converting import convert as conversion

    arguments: dict[str, Any] = {"to": to, "dtype": dtype, "shard_size": shard_size}
    arguments["attention_head_dim"] = attention_head_dim
    if dry_run:
        lines = list(conversion.plan(source, destination, **arguments).describe())
        print_lines(json.dumps({"plan": lines}) if as_json else "\n".join(lines))
        return
    done = conversion.convert(source, destination, **arguments, verify=verify, progress=True)
    print_lines(json.dumps({"destination": str(destination), "report": str(done)}) if as_json else done)


@command
def prepare(
    model: Annotated[str, Argument(help="Name (see `wan22 models`), repository, folder, or weight file.")],
    dtype: Annotated[
        str, Option(help="bf16; or fp8, as --quantize fp8 makes the transformers: changes the result.")
    ] = "bf16",
    revision: Annotated[str | None, Option(help="Commit or branch of a repository.")] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Download and write without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint once, so that later loads in bf16 need not: they find it by themselves.

    wan22 prepare Wan2.2-T2V-A14B

    wan22 prepare Wan2.2-T2V-A14B --dtype fp8 --yes

    Sizes are shown and confirmed first. Models go to $WAN22_CACHE, or the assets of Hugging Face's cache.

    The source stays, and nothing is deleted; interrupted, it goes on.
    """
    from .preparing import prepare_model

    prepare_model(model, dtype, revision, yes, as_json)


@command
def info(
    file: Annotated[str, Argument(help="Video or picture of wan22, weight file, folder, or repository.")],
    as_json: Json = False,
) -> None:
    """Print the recipe in a video, or what a checkpoint is and what loads it.

    wan22 info cats.mp4

    wan22 info high_noise_model.safetensors
    """
    from .info import describe

    describe(file, as_json)


@command
def models(as_json: Json = False) -> None:
    """List the checkpoints that are known by name.

    wan22 models
    """
    from .info import list_models

    list_models(as_json)
