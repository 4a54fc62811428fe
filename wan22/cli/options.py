"""The options that several commands share, declared once; each names the argument that it becomes."""

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

VIDEO, LOADING, SAMPLING, OUTPUT = "The video", "The checkpoint and the machine", "Sampling", "Output"


class Dtype(str, Enum):
    """How the transformers compute."""

    stored = "stored"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Fit(str, Enum):
    """How an image of another aspect is fitted."""

    crop = "crop"
    pad = "pad"
    stretch = "stretch"


Prompt = Annotated[str, Argument(help="What is to be seen.", show_default=False)]
NegativePrompt = Annotated[
    str | None,
    Option(help="What is not to be seen; default is the checkpoint's.", rich_help_panel=VIDEO),
]
Height = Annotated[int | None, Option(help="Pixels; default is the checkpoint's.", rich_help_panel=VIDEO)]
Width = Annotated[int | None, Option(help="Pixels; default is the checkpoint's.", rich_help_panel=VIDEO)]
NumFrames = Annotated[
    int | None,
    Option(
        "--num-frames",
        "--frames",
        help="1 + a multiple of 4; default is the checkpoint's.",
        rich_help_panel=VIDEO,
    ),
]
Seed = Annotated[int | None, Option(help="Of the noise; default is drawn and told.", rich_help_panel=VIDEO)]
NumVideos = Annotated[
    int, Option("--num-videos", "-n", help="Videos of this prompt: seed, seed + 1, …", rich_help_panel=VIDEO)
]
LastImage = Annotated[str | None, Option(help="The last frame, file or URL.", rich_help_panel=VIDEO)]
MaxArea = Annotated[
    int | None, Option(help="Pixels in all, where the size follows the image.", rich_help_panel=VIDEO)
]
FitOption = Annotated[
    Fit | None, Option("--fit", help="How an image of another aspect is fitted.", rich_help_panel=VIDEO)
]

Model = Annotated[
    str | None,
    Option(
        "--model",
        "-m",
        help="Name (see `wan22 models`), hub repository, folder, or file of the only or the high-noise "
        "transformer. Default: the miniature inside wan22, which draws coloured shapes.",
        rich_help_panel=LOADING,
        show_default=False,
    ),
]
Low = Annotated[
    str | None, Option(help="File of the low-noise transformer, beside a file.", rich_help_panel=LOADING)
]
Vae = Annotated[str | None, Option(help="File of the VAE, beside a file.", rich_help_panel=LOADING)]
TextEncoder = Annotated[
    str | None, Option(help="File of the text encoder, beside a file.", rich_help_panel=LOADING)
]
Tokenizer = Annotated[
    str | None,
    Option(help="Folder or repository, beside a file: google/umt5-xxl.", rich_help_panel=LOADING),
]
Revision = Annotated[str | None, Option(help="Commit or branch of a repository.", rich_help_panel=LOADING)]
DtypeOption = Annotated[
    Dtype | None,
    Option(
        "--dtype",
        help="Default: as stored; fp32 for the miniature on a CPU.",
        rich_help_panel=LOADING,
    ),
]
Device = Annotated[
    str | None, Option(help="cuda, cuda:1, cpu, mps; default is the best there is.", rich_help_panel=LOADING)
]
Memory = Annotated[
    str | None,
    Option(help='What of the GPU\'s memory may be used: "auto", "12GB".', rich_help_panel=LOADING),
]
Quantize = Annotated[
    str | None, Option(help="fp8, fp8_dynamic or int8: changes the result.", rich_help_panel=LOADING)
]
Compile = Annotated[bool, Option("--compile", help="Compile the models first.", rich_help_panel=LOADING)]
Accelerate = Annotated[
    bool, Option("--accelerate", help="Faster; results move by rounding.", rich_help_panel=LOADING)
]
Attention = Annotated[str | None, Option(help="The attention kernel's name.", rich_help_panel=LOADING)]
LoraOption = Annotated[
    list[str] | None,
    Option(
        "--lora",
        help="LoRA for all transformers: file, folder or repository; with =0.8 its strength. Repeatable.",
        rich_help_panel=LOADING,
    ),
]
LoraHigh = Annotated[str | None, Option(help="LoRA of the high-noise expert.", rich_help_panel=LOADING)]
LoraLow = Annotated[str | None, Option(help="LoRA of the low-noise expert.", rich_help_panel=LOADING)]
ParallelOption = Annotated[
    str | None,
    Option(
        "--parallel",
        help='Under torchrun: "auto", which is the default, or such as "cfg=2,ulysses=4,fsdp=true".',
        rich_help_panel=LOADING,
    ),
]
Tiling = Annotated[
    bool, Option("--tiling", help="VAE in blended tiles: changes the result.", rich_help_panel=LOADING)
]

Steps = Annotated[
    int | None,
    Option("--steps", "--num-inference-steps", help="Denoising steps.", rich_help_panel=SAMPLING),
]
Guidance = Annotated[
    float | None,
    Option("--guidance-scale", "-g", help="Of the high-noise or only transformer.", rich_help_panel=SAMPLING),
]
Guidance2 = Annotated[
    float | None,
    Option("--guidance-scale-2", help="Of the low-noise transformer.", rich_help_panel=SAMPLING),
]
FlowShift = Annotated[float | None, Option(help="Of the noise schedule.", rich_help_panel=SAMPLING)]
Sigmas = Annotated[
    str | None, Option(help="Noise levels instead of steps: 1.0,0.8,0.3", rich_help_panel=SAMPLING)
]
Timesteps = Annotated[
    str | None, Option(help="Timesteps instead of steps: 1000,750,500", rich_help_panel=SAMPLING)
]
Recipe = Annotated[
    str | None,
    Option(help="lightning-4: for LoRAs distilled to four steps.", rich_help_panel=SAMPLING),
]
MaxSequenceLength = Annotated[
    int, Option(help="Tokens at which a prompt is cut.", rich_help_panel=SAMPLING, min=1, max=512)
]
AttentionKwargs = Annotated[
    str | None,
    Option(help='JSON: {"scale": 0.5} multiplies all LoRAs by it.', rich_help_panel=SAMPLING),
]
NoiseDevice = Annotated[
    str | None, Option(help="Where the noise is drawn; cpu is the same everywhere.", rich_help_panel=SAMPLING)
]

Output = Annotated[
    Path | None,
    Option(
        "--output",
        "-o",
        help="File: .mp4, .gif, .webp, .png, .npy. Default: named after the prompt.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace existing files.", rich_help_panel=OUTPUT)]
Quality = Annotated[int | None, Option(help="1 to 100, for .mp4 and .webp.", rich_help_panel=OUTPUT)]
Crf = Annotated[int | None, Option(help="H.264's own scale, 0 to 51, for .mp4.", rich_help_panel=OUTPUT)]
ContactSheet = Annotated[
    bool, Option("--contact-sheet", help="Also save a picture of some frames.", rich_help_panel=OUTPUT)
]
PreviewOption = Annotated[
    Path | None,
    Option("--preview", help="File that shows the video meanwhile: .png, .gif.", rich_help_panel=OUTPUT),
]
PreviewEvery = Annotated[int | None, Option(help="Steps between previews.", rich_help_panel=OUTPUT)]
PreviewDecoder = Annotated[
    Path | None,
    Option(help="Tiny autoencoder for finer previews: taew2_1, taew2_2.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool, Option("--json", help="Print the result as JSON, and nothing else.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Show no progress.", rich_help_panel=OUTPUT)]
