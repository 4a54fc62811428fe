"""The autoencoders at their real width beside diffusers' own, and how much memory decoding takes.

    python -m tests.bench.autoencoder

Decoding and encoding are timed as `pipe.accelerate()` lets them be; the note says how far the result is from
that of diffusers. The condition, an image and 80 zero frames, is encoded by the plain model, which computes
only what changes: the note says whether that is, bit for bit, what computing every chunk gives.
"""

import ctypes
import gc
from collections.abc import Callable
from functools import partial

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.harness import (
    DTYPES,
    Row,
    Settings,
    apart,
    compare,
    main,
    relative_error,
    watched_memory,
)
from wan22 import AutoencoderKLWan
from wan22.accel.offload.histories import HostHistories
from wan22.accel.planning.meta_models import VAE_22
from wan22.accel.planning.trace import TracedDevice, peak_bytes
from wan22.accel.vae import accelerate
from wan22.models.temporal_cache import TemporalCache

# What differs from the defaults, which are those of 2.1.
CONFIGS: dict[str, dict[str, object]] = {"2.1": {}, "2.2": VAE_22}
DECODE_TARGETS = {torch.float32: 1.2, torch.bfloat16: 1.3}
ENCODE_TARGET, CONDITION_TARGET, STRIPS_TARGET = 1.0, 2.5, 0.75
FRAMES, CONDITION_FRAMES = 9, 81
# Width, height, and GB beyond the weights: of the 14B models, and of TI2V-5B.
DEVICE_TARGETS = {"2.1": (1280, 720, 4.0), "2.2": (1280, 704, 5.0)}
M_MMAP_THRESHOLD = -3  # of glibc's mallopt; setting it keeps it from growing


def random_vaes(family: str, dtype: torch.dtype) -> tuple[AutoencoderKLWan, diffusers.AutoencoderKLWan]:
    """Return our autoencoder and theirs with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**CONFIGS[family]).to(dtype).eval().requires_grad_(False)
    with torch.device("meta"):
        ours = AutoencoderKLWan(**CONFIGS[family])  # type: ignore[arg-type]
    ours.load_state_dict({key: w.clone() for key, w in theirs.state_dict().items()}, assign=True)
    return ours.eval().requires_grad_(False), theirs


def random_latents(vae: AutoencoderKLWan, frames: int, height: int, width: int) -> Tensor:
    """Draw latents "1 c t h w" of a video of a size in pixels."""
    s = vae.spatial_stride
    shape = 1, vae.config.z_dim, 1 + (frames - 1) // vae.temporal_stride, height // s, width // s
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(vae.dtype)


def random_video(vae: AutoencoderKLWan, frames: int, side: int) -> Tensor:
    """Draw pixels "1 3 t h w"."""
    x = torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(2))
    return (x * 2 - 1).to(vae.dtype)


def both_ways(family: str, dtype: torch.dtype, settings: Settings) -> list[Row]:
    """Decode and encode a short clip."""
    ours, theirs = random_vaes(family, dtype)
    accelerate(ours)
    side = 64 if settings.quick else 128
    z, x = random_latents(ours, FRAMES, side, side), random_video(ours, FRAMES, side)
    cases = {
        "decode": (lambda vae: vae.decode(z).sample, DECODE_TARGETS[dtype]),
        "encode": (lambda vae: vae.encode(x).latent_dist.parameters, ENCODE_TARGET),
    }
    rows = []
    for name, (function, target) in cases.items():
        error = relative_error(function(ours), function(theirs))
        row = compare(
            f"VAE {family} {name}",
            lambda function=function: function(ours),  # type: ignore[misc]
            lambda function=function: function(theirs),  # type: ignore[misc]
            settings,
            target,
            dtype=DTYPES[dtype],
            shape=f"{side}x{side}x{FRAMES}",
            note=f"error {error:.1e}",
        )
        rows.append(row)
    return rows


def condition(family: str, dtype: torch.dtype, settings: Settings) -> Row:
    """Encode an image and zero frames in pieces, as WanI2VPipeline does."""
    ours, theirs = random_vaes(family, dtype)
    side = 64 if settings.quick else 96
    zeros = torch.zeros(1, 3, CONDITION_FRAMES - 1, side, side, dtype=dtype)
    x = torch.cat([random_video(ours, 1, side), zeros], dim=2)
    pieces = [x[:, :, :1], *x[:, :, 1:].split(4, dim=2)]

    def stream() -> Tensor:
        return torch.cat([posterior.parameters for posterior in ours.encode_stream(pieces)], dim=2)

    cache = TemporalCache()
    every = torch.cat([ours.quant_conv(ours.encode_chunk(piece, cache)) for piece in pieces], dim=2)
    same = torch.equal(stream(), every)
    row = compare(
        f"VAE {family} I2V condition",
        stream,
        lambda: theirs.encode(x),
        settings,
        CONDITION_TARGET,
        dtype=DTYPES[dtype],
        shape=f"{side}x{side}x{CONDITION_FRAMES}",
        note="same bits as every chunk" if same else "OTHER BITS than every chunk",
    )
    return row | {"met": row["met"] and same}


def decode_peak(family: str, frames: int, height: int, width: int, strips: int) -> float:
    """Return the GB that decoding a clip takes beyond the weights; strips: 0 for none."""
    vae = AutoencoderKLWan(**CONFIGS[family]).to(torch.bfloat16)  # type: ignore[arg-type]
    accelerate(vae)
    if strips:
        vae.enable_strips(strips)
    z = random_latents(vae, frames, height, width)
    # What building the model took would be used again, unseen; and what is freed shall count no more.
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 2**17)
    with watched_memory() as memory:
        for _ in vae.decode_stream(z):
            pass
    return memory.peak


def strips(family: str, settings: Settings) -> Row:
    """Compare the memory of decoding in strips with that of whole frames, and of more frames."""
    # Narrower ones are of kernels' own buffers more than of what strips are about.
    height, width = 768, (64 if settings.quick else 192)
    whole, stripped, longer = (
        apart(decode_peak, family, frames, height, width, count)
        for frames, count in ((FRAMES, 0), (FRAMES, 4), (2 * FRAMES - 1, 4))
    )
    return {
        "name": f"VAE {family} memory of strips",
        "dtype": "bf16",
        "shape": f"{width}x{height}x{FRAMES}",
        "target": f"peak <= {STRIPS_TARGET:g} x whole, flat in frames",
        "met": stripped <= STRIPS_TARGET * whole and longer <= 1.05 * stripped,
        "peak_gb": stripped,
        "note": f"peak {stripped:.2f} GB, {2 * FRAMES - 1} frames {longer:.2f} GB, whole {whole:.2f} GB, "
        f"{stripped / whole:.2f} x",
    }


@torch.no_grad()
def traced_strips(family: str, encodes: bool) -> Row:
    """Compare the memory of strips on a device, whose histories lie on the host, with that of whole frames.

    Bytes of tensors that are alive at once, and products, at the released sizes; nothing is computed.
    """
    width, height, most = DEVICE_TARGETS[family]
    with torch.device("meta"):
        vae = AutoencoderKLWan(**CONFIGS[family])  # type: ignore[arg-type]

    def work(latents: int, caches: Callable[[], TemporalCache] = TemporalCache) -> None:
        frames = 4 * latents - 3
        if encodes:
            sizes = [1, *[4] * (latents - 1)]
            pieces = (torch.empty(1, 3, size, height, width, device="meta") for size in sizes)
            stream = vae.encode_stream(pieces, caches=caches)
        else:
            stream = vae.decode_stream(random_latents(vae, frames, height, width).to("meta"), caches=caches)
        for _ in stream:
            pass

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            work(3)
        return counter.get_total_flops()

    whole, once, notes, peaks = peak_bytes(work, 3) / 1e9, products(), [], []
    for strips in (4, 8):
        vae.enable_strips(strips)
        device = TracedDevice()
        peaks.append(peak_bytes(work, 3, partial(HostHistories, device)) / 1e9)
        more = products() / once
        notes.append(f"{strips}: {peaks[-1]:.2f} GB, {device.host / 1e9:.2f} on the host, work {more:.3f} x")
    longer = peak_bytes(work, 6, partial(HostHistories, TracedDevice())) / 1e9
    return {
        "name": f"VAE {family} {'encode' if encodes else 'decode'} in strips, traced",
        "dtype": "fp32",
        "shape": f"{width}x{height}",
        "target": f"peak of 4 <= {most:g} GB, flat in frames",
        "met": peaks[0] <= most and longer <= 1.01 * peaks[-1],
        "peak_gb": peaks[0],
        "note": f"whole {whole:.2f} GB; " + "; ".join(notes),
    }


@torch.no_grad()
def run(settings: Settings) -> list[Row]:
    """Compare the autoencoders; quick: that of 2.1 in bf16 on a quarter of the pixels."""
    few = Settings(1 if settings.quick else min(settings.rounds, 2), settings.quick, settings.cpu_time)
    families = ["2.1"] if settings.quick else list(CONFIGS)
    dtypes = [torch.bfloat16] if settings.quick else list(DTYPES)
    rows = [row for family in families for dtype in dtypes for row in both_ways(family, dtype, few)]
    rows += [condition(family, torch.bfloat16, few) for family in families]
    rows += [strips(family, few) for family in families]
    return rows + [traced_strips(family, encodes) for family in families for encodes in (False, True)]


if __name__ == "__main__":
    main(run, __doc__)
