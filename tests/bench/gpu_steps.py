"""Transformer steps and VAE decodes of the released sizes on a device, beside diffusers' own.

The weights are random, made on the device, and shared by both sides. The floor of a step is its matrix
products at the rate that a large one reaches in the same run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import diffusers
import torch

from tests.bench.harness import (
    DTYPES,
    Row,
    Settings,
    compare,
    relative_error,
    synchronize,
    watched_memory,
)
from tests.bench.transformer import OURS_WIDE, THEIRS_WIDE, fill, random_weights
from wan22 import AutoencoderKLWan, WanTransformer3DModel
from wan22.accel.attention import describe
from wan22.accel.compile import Compiled
from wan22.accel.planning.costs import forward_flops
from wan22.accel.planning.machine import measured_flops
from wan22.accel.planning.meta_models import released_models
from wan22.accel.vae import accelerate
from wan22.models.fused import set_fused
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
    time = torch.full((1,), 937.0, device=device)
    # diffusers' pipeline gives TI2V-5B the time once per token.
    their_time = time.expand(1, video.tokens) if video.preset.boundary_ratio is None else time
    return (
        lambda: ours(latents, time, text, return_dict=False)[0],
        lambda: theirs(latents.to(dtype), their_time, text, return_dict=False)[0],
    )


@torch.no_grad()
def steps(video: Video, settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Compare one call of the transformer, ours unfused, fused and compiled, with theirs."""
    config = released_configs(video.preset)["transformer"] | (TINY if tiny else {})
    d = config["num_attention_heads"] * config["attention_head_dim"]
    facts = {"dtype": "bf16", "shape": f"{video}, {video.tokens} tokens"}
    name = f"{video.preset.name} step"
    # Ten float32 streams cover what a block holds at once.
    weights = 2 * config["num_layers"] * (8 * d**2 + 2 * d * config["ffn_dim"])
    if missing := lacks(weights + 10 * 4 * video.tokens * d, device):
        yield {"name": name, **facts, "note": missing}
        return
    ours, theirs = transformers(config, device)
    calls = step_calls(ours, theirs, video, device)
    kernel = describe("native", device, torch.bfloat16, ours.head_dim, video.tokens)
    flops = forward_flops(ours.config, video.tokens)

    def compared(way: str, **more: Any) -> Row:
        row = compare(f"{name}, {way}", *calls, settings, **facts, **more)
        row |= roofline(flops, row["ours_s"], device) | {"kernel": kernel}
        row["note"] = row.get("note", "") + (
            f"{row['tflop']:.4g} TFLOP, floor {row['floor_s']:.3g} s at {row['matmul_tflops']:.3g} TFLOP/s: "
            f"{row['share_of_floor']:.0%} of it; {kernel}"
        )
        return row

    error = relative_error(*(call().cpu() for call in calls))
    with unfused():
        yield compared("eager", difference=error)
    yield compared("fused", **peaks(calls, device), difference=error)
    backend = "eager" if tiny else "inductor"
    compiled = Compiled([ours], backend=backend)
    theirs.compile_repeated_blocks(fullgraph=True, backend=backend)
    seconds = [timed(call) for call in calls]
    yield compared("compiled", compile_s=seconds[0], diffusers_compile_s=seconds[1])
    compiled.detach()


@contextmanager
def unfused() -> Iterator[None]:
    """Compute without fused kernels."""
    set_fused(False)
    try:
        yield
    finally:
        set_fused()


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
def decodes(video: Video, settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Compare decoding a whole clip, chunk by chunk to the host as the pipelines do, in each of WAYS."""
    config = released_configs(video.preset)["vae"] | (TINY_VAE if tiny else {})
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in config.items()}  # theirs adds lists
    for dtype, tf32, way in WAYS:
        label = f"{DTYPES[dtype]}, TF32" if tf32 else DTYPES[dtype]
        facts = {"dtype": label, "shape": str(video)}
        name = f"{video.preset.name} decode, {way}"
        # Measured at 720p in bf16: 10.6 GB.
        if missing := lacks(6000 * dtype.itemsize * video.height * video.width, device):
            yield {"name": name, **facts, "note": missing}
            continue
        with torch.device("meta"):
            ours, theirs = AutoencoderKLWan(**config), diffusers.AutoencoderKLWan(**config)
        weights = random_weights(ours, device, dtype)
        fill(ours, weights, ())
        fill(theirs, weights, ())
        if way == "accelerated":
            accelerate(ours)
        z = torch.randn(1, config["z_dim"], *video.latent_size, device=device, dtype=dtype)
        calls = partial(_our_frames, ours, z), partial(_their_frames, theirs, z)
        with tensor_float32(tf32), unfused() if way == "eager" else nullcontext():
            facts |= {"difference": relative_error(*(call() for call in calls)), **peaks(calls, device)}
            row = compare(name, *calls, settings, **facts)
        yield row | {"note": f"{row.get('note', '')}difference {row['difference']:.1e}"}


# Dtype, whether float32 convolutions may round to TF32, and how.
WAYS = (
    (torch.float32, False, "fused"),
    (torch.float32, True, "fused"),
    (torch.bfloat16, False, "eager"),
    (torch.bfloat16, False, "fused"),
    (torch.bfloat16, False, "accelerated"),
)


def _our_frames(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.cat([chunk.float().cpu() for chunk in vae.decode_stream(z)], dim=2)


def _their_frames(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z, return_dict=False)[0].float().cpu()


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Let float32 convolutions on a GPU round their operands to TF32, or not; PyTorch's default is to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ---- what they share ----


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


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, its work on the GPU included."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def small(video: Video) -> Video:
    """Return a video that the CPU makes in a second."""
    return replace(video, width=64, height=64, num_frames=9)
