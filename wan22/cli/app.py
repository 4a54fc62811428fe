"""The commands: each takes its options and hands them on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from . import options as o
from .running import LOADING, SAVING, json_object, load, make, name_of, numbers, report, say, told

app = typer.Typer(
    help="Make videos with Wan 2.1 and 2.2.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
# Options with a name of their own here.
_CALL = {"steps": "num_inference_steps", "num_videos": "num_videos_per_prompt"}


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Make videos with Wan 2.1 and 2.2."""
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit()


@app.command()
@told
def t2v(
    prompt: o.Prompt,
    negative_prompt: o.NegativePrompt = None,
    height: o.Height = None,
    width: o.Width = None,
    num_frames: o.NumFrames = None,
    seed: o.Seed = None,
    num_videos: o.NumVideos = 1,
    model: o.Model = None,
    low: o.Low = None,
    vae: o.Vae = None,
    text_encoder: o.TextEncoder = None,
    tokenizer: o.Tokenizer = None,
    revision: o.Revision = None,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    memory: o.Memory = None,
    quantize: o.Quantize = None,
    compile: o.Compile = False,
    accelerate: o.Accelerate = False,
    attention: o.Attention = None,
    lora: o.LoraOption = None,
    lora_high: o.LoraHigh = None,
    lora_low: o.LoraLow = None,
    tiling: o.Tiling = False,
    parallel: o.ParallelOption = None,
    steps: o.Steps = None,
    guidance_scale: o.Guidance = None,
    guidance_scale_2: o.Guidance2 = None,
    flow_shift: o.FlowShift = None,
    sigmas: o.Sigmas = None,
    timesteps: o.Timesteps = None,
    recipe: o.Recipe = None,
    max_sequence_length: o.MaxSequenceLength = 512,
    attention_kwargs: o.AttentionKwargs = None,
    noise_device: o.NoiseDevice = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    quality: o.Quality = None,
    crf: o.Crf = None,
    contact_sheet: o.ContactSheet = False,
    preview: o.PreviewOption = None,
    preview_every: o.PreviewEvery = None,
    preview_decoder: o.PreviewDecoder = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a video of a prompt.

    wan22 t2v "a red circle moves to the right on a blue background"

    wan22 t2v "two cats box on a stage" --model Wan2.2-T2V-A14B --memory 24GB -o cats.mp4

    torchrun --nproc-per-node=4 -m wan22.cli t2v "two cats box on a stage" --model Wan2.2-T2V-A14B
    """
    _generate("t2v", locals())


@app.command()
@told
def i2v(
    image: Annotated[str, Argument(help="The first frame: file or URL.", show_default=False)],
    prompt: o.Prompt,
    last_image: o.LastImage = None,
    max_area: o.MaxArea = None,
    fit: o.FitOption = None,
    negative_prompt: o.NegativePrompt = None,
    height: o.Height = None,
    width: o.Width = None,
    num_frames: o.NumFrames = None,
    seed: o.Seed = None,
    num_videos: o.NumVideos = 1,
    model: o.Model = None,
    low: o.Low = None,
    vae: o.Vae = None,
    text_encoder: o.TextEncoder = None,
    tokenizer: o.Tokenizer = None,
    revision: o.Revision = None,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    memory: o.Memory = None,
    quantize: o.Quantize = None,
    compile: o.Compile = False,
    accelerate: o.Accelerate = False,
    attention: o.Attention = None,
    lora: o.LoraOption = None,
    lora_high: o.LoraHigh = None,
    lora_low: o.LoraLow = None,
    tiling: o.Tiling = False,
    parallel: o.ParallelOption = None,
    steps: o.Steps = None,
    guidance_scale: o.Guidance = None,
    guidance_scale_2: o.Guidance2 = None,
    flow_shift: o.FlowShift = None,
    sigmas: o.Sigmas = None,
    timesteps: o.Timesteps = None,
    recipe: o.Recipe = None,
    max_sequence_length: o.MaxSequenceLength = 512,
    attention_kwargs: o.AttentionKwargs = None,
    noise_device: o.NoiseDevice = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    quality: o.Quality = None,
    crf: o.Crf = None,
    contact_sheet: o.ContactSheet = False,
    preview: o.PreviewOption = None,
    preview_every: o.PreviewEvery = None,
    preview_decoder: o.PreviewDecoder = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a video that starts from an image.

    wan22 i2v shapes.png "a white triangle moves to the left on a blue background"

    wan22 i2v cat.jpg "the cat yawns" --model Wan2.2-I2V-A14B --memory 24GB --last-image asleep.jpg
    """
    _generate("i2v", locals())


@app.command()
@told
def batch(
    file: Annotated[
        Path, Argument(help="One item a line: a prompt (.txt), or JSON with prompt, image, seed, …")
    ],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the videos and results.jsonl.")],
    ending: Annotated[str, Option(help="Format of the videos.")] = ".mp4",
    model: o.Model = None,
    low: o.Low = None,
    vae: o.Vae = None,
    text_encoder: o.TextEncoder = None,
    tokenizer: o.Tokenizer = None,
    revision: o.Revision = None,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    memory: o.Memory = None,
    quantize: o.Quantize = None,
    compile: o.Compile = False,
    accelerate: o.Accelerate = False,
    attention: o.Attention = None,
    lora: o.LoraOption = None,
    lora_high: o.LoraHigh = None,
    lora_low: o.LoraLow = None,
    tiling: o.Tiling = False,
    parallel: o.ParallelOption = None,
    quality: o.Quality = None,
    crf: o.Crf = None,
    contact_sheet: o.ContactSheet = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a video of each line of a file; what is done already is skipped, what fails is recorded.

    wan22 batch prompts.jsonl -o videos

    where a line is {"prompt": "a red circle grows", "seed": 1, "num_inference_steps": 10, "name": "circle"}
    """
    from .batches import run_batch

    run_batch(file, output, ending, locals())


@app.command()
@told
def reproduce(
    file: Annotated[Path, Argument(help="Video that was saved with its recipe.")],
    model: o.Model = None,
    image: Annotated[str | None, Option(help="The first frame, if it was in memory.")] = None,
    last_image: o.LastImage = None,
    seed: o.Seed = None,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    memory: o.Memory = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    quality: o.Quality = None,
    crf: o.Crf = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a video again from the recipe in its file.

    wan22 reproduce cats.mp4 -o again.mp4
    """
    from .again import run_again

    run_again(locals())


@app.command()
@told
def convert(
    source: Annotated[str, Argument(help="Folder or repository in any layout, or a weight file.")],
    destination: Annotated[Path, Argument(help="Folder, or .safetensors file, that is not there yet.")],
    to: Annotated[str, Option(help="diffusers, official, or single-file.")],
    dtype: Annotated[str | None, Option(help="bf16, fp16 or fp32; default: as stored.")] = None,
    shard_size: Annotated[str, Option(help="Largest file.")] = "5GB",
    attention_head_dim: Annotated[int | None, Option(help="If it is not 128.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would be written.")] = False,
    verify: Annotated[bool, Option("--verify", help="Read the result, compare every tensor.")] = False,
    as_json: o.Json = False,
) -> None:
    """Convert a checkpoint, or one model's file, to another layout or dtype; interrupted, it goes on.

    wan22 convert Wan2.2-T2V-A14B Wan2.2-T2V-A14B-Diffusers --to diffusers
    """
    from ..checkpoints.converting import convert as conversion

    arguments: dict[str, Any] = {"to": to, "dtype": dtype, "shard_size": shard_size}
    arguments["attention_head_dim"] = attention_head_dim
    if dry_run:
        lines = list(conversion.plan(source, destination, **arguments).describe())
        print(json.dumps({"plan": lines}) if as_json else "\n".join(lines))
        return
    done = conversion.convert(source, destination, **arguments, verify=verify, progress=True)
    print(json.dumps({"destination": str(destination), "report": str(done)}) if as_json else done)


@app.command()
@told
def info(
    file: Annotated[str, Argument(help="Video or picture of wan22, weight file, folder, or repository.")],
    as_json: o.Json = False,
) -> None:
    """Print the recipe in a video, or what a checkpoint is and what loads it.

    wan22 info cats.mp4

    wan22 info high_noise_model.safetensors
    """
    from .describing import describe

    describe(file, as_json)


@app.command()
@told
def models(as_json: o.Json = False) -> None:
    """List the checkpoints that are known by name.

    wan22 models
    """
    from .describing import list_models

    list_models(as_json)


def _generate(task: str, given: Mapping[str, Any]) -> None:
    """Load, make, save, report."""
    target = given["output"] or name_of(given["prompt"])
    saving = {name: given[name] for name in SAVING}
    skipped = {*LOADING, *SAVING}
    call = {_CALL.get(name, name): value for name, value in given.items() if name not in skipped}
    call |= {name: numbers(name, given[name]) for name in ("sigmas", "timesteps")}
    call["attention_kwargs"] = json_object("attention-kwargs", given["attention_kwargs"])
    if call.get("fit") is not None:
        call["fit"] = call["fit"].value
    for name in ("preview_every", "preview_decoder"):
        if given[name] is not None and given["preview"] is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --preview FILE")
    if call.get("image") is not None and not call["image"].startswith(("http://", "https://")):
        _check_file(call["image"])
    pipe = load(task, given, given["quiet"])
    if not given["quiet"]:
        say(f"{pipe.checkpoint_name} on {pipe.device}, to {target}")
    report(make(pipe, call, target, saving), given["as_json"])


def _check_file(path: str) -> None:
    """Refuse a file that is not there before anything is loaded."""
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"there is no file {path}")
