"""Whole transformer steps and VAE decodes of the released sizes on a GPU, beside diffusers' own.

    python -m tests.bench.gpu [--device cpu --tiny]

The weights are random, made on the device, and shared by both sides. The floor of a step is its matrix
products at the rate that a large one reaches in the same run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers
import torch

from tests.bench.harness import (
    DTYPES,
    Row,
    Settings,
    arguments,
    compare,
    relative_error,
    report,
    settings_of,
    watched_memory,
)
from tests.bench.transformer import OURS_WIDE, THEIRS_WIDE, fill, random_weights
from wan22 import AutoencoderKLWan, WanTransformer3DModel
from wan22.accel.attention import describe
from wan22.accel.compile import Compiled
from wan22.accel.planning.costs import forward_flops
from wan22.accel.planning.machine import measured_flops
from wan22.accel.planning.meta_models import released_models
from wan22.presets import T2V_A14B, TI2V_5B, Preset

MAX_TEXT_TOKENS = 512
TERA = 1e12
# The same forms in small, for a run without a GPU.
TINY = {"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 256, "text_dim": 32}
TINY_VAE = {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}


@dataclass(frozen=True)
class Video:
    """What a released checkpoint is asked for.

    Args:
        preset: the checkpoint.
        width: pixels.
        height: pixels.
        num_frames: frames.
    """

    preset: Preset
    width: int
    height: int
    num_frames: int

    @property
    def stride(self) -> int:
        """Pixels per latent row and column."""
        return 16 if self.preset.in_channels == 48 else 8

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return 1 + (self.num_frames - 1) // 4, self.height // self.stride, self.width // self.stride

    @property
    def tokens(self) -> int:
        """Video tokens."""
        t, h, w = self.latent_size
        return t * (h // 2) * (w // 2)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


VIDEOS = (Video(T2V_A14B, 832, 480, 81), Video(T2V_A14B, 1280, 720, 81), Video(TI2V_5B, 1280, 704, 121))


@cache
def released_configs(preset: Preset) -> dict[str, dict[str, Any]]:
    """Return the configurations of a released checkpoint's transformer and VAE."""
    models = released_models(preset)
    return {name: dict(models[name].config) for name in ("transformer", "vae")}


# ---- transformer ----


def transformers(config: dict[str, Any], device: str) -> tuple[Any, Any]:
    """Return our bf16 transformer and theirs with the same random weights."""
    with torch.device("meta"):
        ours = WanTransformer3DModel(**config)
        theirs = diffusers.WanTransformer3DModel(**config)
    weights = random_weights(ours, device, torch.bfloat16)
    fill(ours, weights, OURS_WIDE)
    # The rotary tables are buffers that no checkpoint holds.
    head_dim, length = theirs.config.attention_head_dim, theirs.config.rope_max_seq_len
    theirs.rope = type(theirs.rope)(head_dim, theirs.config.patch_size, length).to(device)
    fill(theirs, weights, (*THEIRS_WIDE, "time_embedder"))
    return ours, theirs


def step_calls(
    ours: Any, theirs: Any, video: Video, device: str
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Return a call of our transformer as our pipelines make it, and theirs."""
    config, dtype = ours.config, torch.bfloat16
    latents = torch.randn(1, config.in_channels, *video.latent_size, device=device)
    text = torch.randn(1, MAX_TEXT_TOKENS, config.text_dim, device=device, dtype=dtype)
    text[:, 60:] = 0  # past a typical prompt
    time = torch.tensor([937.0], device=device)
    # diffusers' pipeline gives TI2V-5B the time once per token.
    their_time = time.expand(1, video.tokens) if video.preset.boundary_ratio is None else time
    return (
        lambda: ours(latents, time, text, return_dict=False)[0],
        lambda: theirs(latents.to(dtype), their_time, text, return_dict=False)[0],
    )


@torch.no_grad()
def steps(video: Video, settings: Settings, device: str, tiny: bool) -> list[Row]:
    """Compare one call of the transformer, ours as it is and compiled, with theirs."""
    config = released_configs(video.preset)["transformer"] | (TINY if tiny else {})
    d = config["num_attention_heads"] * config["attention_head_dim"]
    facts = {"dtype": "bf16", "shape": f"{video}, {video.tokens} tokens"}
    name = f"{video.preset.name} step"
    # Ten float32 streams cover what a block holds at once.
    weights = 2 * config["num_layers"] * (8 * d**2 + 2 * d * config["ffn_dim"])
    if missing := lacks(weights + 10 * 4 * video.tokens * d, device):
        return [{"name": name, **facts, "note": missing}]
    ours, theirs = transformers(config, device)
    calls = step_calls(ours, theirs, video, device)
    kernel = describe("native", device, torch.bfloat16, ours.head_dim, video.tokens)
    error = relative_error(*(call().cpu() for call in calls))
    flops = forward_flops(ours.config, video.tokens)
    rows = [compare(name, *calls, settings, **facts, **peaks(calls, device))]
    compiled = Compiled([ours], backend="eager" if tiny else "inductor")
    started = time.perf_counter()
    calls[0]()
    seconds = time.perf_counter() - started
    rows.append(compare(f"{name}, compiled", *calls, settings, **facts))
    rows[1]["compile_s"] = seconds
    compiled.detach()
    for row in rows:
        row |= roofline(flops, row["ours_s"], device) | {"kernel": kernel, "difference": error}
        row["note"] = row.get("note", "") + (
            f"{row['tflop']:.4g} TFLOP, floor {row['floor_s']:.3g} s at {row['matmul_tflops']:.3g} TFLOP/s: "
            f"{row['share_of_floor']:.0%} of it; {kernel}; difference {error:.1e}"
        )
    return rows


def roofline(flops: float, seconds: float, device: str) -> Row:
    """Return how near a time is to that of the matrix products alone."""
    rate = measured_flops(device)
    floor = flops / rate
    return {
        "tflop": flops / TERA,
        "matmul_tflops": rate / TERA,
        "floor_s": floor,
        "share_of_floor": floor / seconds,
    }


# ---- VAE ----


@torch.no_grad()
def decode(video: Video, dtype: torch.dtype, settings: Settings, device: str, tiny: bool) -> Row:
    """Compare decoding a whole clip: ours as the pipelines do it, chunk by chunk to the host."""
    config = released_configs(video.preset)["vae"] | (TINY_VAE if tiny else {})
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in config.items()}  # theirs adds lists
    facts = {"name": f"{video.preset.name} decode", "dtype": DTYPES[dtype], "shape": str(video)}
    # Measured at 720p in bf16: 10.6 GB.
    if missing := lacks(6000 * dtype.itemsize * video.height * video.width, device):
        return facts | {"note": missing}
    with torch.device("meta"):
        ours, theirs = AutoencoderKLWan(**config), diffusers.AutoencoderKLWan(**config)
    weights = random_weights(ours, device, dtype)
    fill(ours, weights, ())
    fill(theirs, weights, ())
    z = torch.randn(1, config["z_dim"], *video.latent_size, device=device, dtype=dtype)

    def our_frames() -> torch.Tensor:
        return torch.cat([chunk.float().cpu() for chunk in ours.decode_stream(z)], dim=2)

    def their_frames() -> torch.Tensor:
        return theirs.decode(z, return_dict=False)[0].float().cpu()

    error = relative_error(our_frames(), their_frames())
    facts |= {"difference": error, **peaks((our_frames, their_frames), device)}
    row = compare(facts.pop("name"), our_frames, their_frames, settings, **facts)
    return row | {"note": f"{row.get('note', '')}difference {error:.1e}"}


# ---- all of it ----


def lacks(needed: float, device: str) -> str:
    """Say that a device has less free memory than needed; empty if it has enough."""
    if device == "cpu":
        return ""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    return f"left out: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free" if free < needed else ""


def peaks(calls: tuple[Callable[[], object], Callable[[], object]], device: str) -> Row:
    """Return the memory that a call of each side takes beside weights; nothing on the CPU."""
    if device == "cpu":
        return {}
    found = []
    for call in calls:
        call()
        with watched_memory(device) as memory:
            call()
        found.append(memory.peak)
    ours, theirs = found
    note = f"peak {ours:.2f} GB, diffusers {theirs:.2f} GB; "
    return {"ours_peak_gb": ours, "diffusers_peak_gb": theirs, "note": note}


def run(settings: Settings, device: str = "cuda", tiny: bool = False) -> list[Row]:
    """Compare steps and decodes; quick: A14B at 480p alone."""
    videos = VIDEOS[:1] if settings.quick else VIDEOS
    if tiny:
        videos = tuple(replace(video, width=64, height=64, num_frames=9) for video in videos[::2])
    few = replace(settings, rounds=min(settings.rounds, 3))  # a call takes seconds, and a GPU is steady
    rows = []
    for video in videos:
        rows += steps(video, few, device, tiny)
    for video in videos[-2:]:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(decode(video, dtype, few, device, tiny))
    return rows


def command_line(run: Callable[..., list[Row]], description: str | None) -> None:
    """Be the command line of a benchmark for GPUs."""
    parser = arguments(description)
    parser.add_argument("--device", default="cuda", help="cpu goes with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small models and videos, to try the script")
    options = parser.parse_args()
    report(run(settings_of(options), options.device, options.tiny), options.json)


if __name__ == "__main__":
    command_line(run, __doc__)
