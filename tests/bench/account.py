"""One forward of a transformer on an H200 by arithmetic: nothing here is measured, and no GPU is needed.

    python -m tests.bench.account [--json FILE] [--parts]

A time is that of the matrix products and of attention at fixed rates, and of the bytes that all other kernels
read and write at a third. The first two rates give the 9.43, 2.35 and 0.724 s of a profile of products and
attention alone; the third is nine tenths of the memory's nominal 4.8 TB/s.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.gpu_steps import VIDEOS, Video, released_configs, step_calls
from tests.bench.harness import DTYPES
from tests.bench.traffic import Traffic, compiled_traffic, eager_traffic, fake_gpu, on_gpu, place
from tests.bench.transformer import OURS_WIDE, THEIRS_WIDE
from wan22 import AutoencoderKLWan, WanTransformer3DModel
from wan22.accel import vae as vae_acceleration
from wan22.accel.compile import Compiled

PRODUCT_RATE = 766e12  # FLOP/s in bf16
ATTENTION_RATE = 662e12
BYTE_RATE = 4.32e12
SIDES = ("wan22", "diffusers")
Step = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A way to compute a forward.

    Args:
        name: of the row.
        seconds: of each video.
        block: what a block's kernels do, for each video.
    """

    name: str
    seconds: tuple[float, ...]
    block: tuple[Traffic, ...] = ()


def bare_seconds(config: dict[str, Any], tokens: int) -> float:
    """Return the time of the video tokens' matrix products in the blocks, and of their self-attention."""
    d, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    products = 2 * tokens * (6 * d * d + 2 * d * config["ffn_dim"])
    attention = 4 * tokens * tokens * d
    return layers * (products / PRODUCT_RATE + attention / ATTENTION_RATE)


def step(side: str, video: Video, layers: int) -> tuple[Any, Step]:
    """Return a transformer with so many layers on the fake GPU, and a call of it; within `fake_gpu`."""
    config = released_configs(video.preset)["transformer"] | {"num_layers": layers}
    with torch.device("meta"):
        model = (WanTransformer3DModel if side == "wan22" else diffusers.WanTransformer3DModel)(**config)
    place(model, torch.bfloat16, (*OURS_WIDE,) if side == "wan22" else (*THEIRS_WIDE, "time_embedder"))
    if side == "diffusers":
        model.rope.freqs_cos, model.rope.freqs_sin = (e.double() for e in model.rope.buffers())
    calls = step_calls(model, model, video, "cuda")
    return model, calls[SIDES.index(side)]


def eager(side: str, video: Video, fused: bool = False) -> tuple[Traffic, Traffic]:
    """Return what a block's kernels do, and what those of a forward without blocks do."""
    with fake_gpu():
        without, one = (eager_traffic(step(side, video, layers)[1], fused) for layers in (0, 1))
    parts = {name: n - without.parts.get(name, 0) for name, n in one.parts.items()}
    block = Traffic(one.nbytes - without.nbytes, one.kernels - without.kernels, parts)
    return block, without


def compiled(side: str, video: Video) -> Traffic:
    """Return what a compiled block's kernels do."""
    with fake_gpu(), on_gpu():
        model, call = step(side, video, 1)

        def run(backend: Any) -> None:
            if side == "wan22":
                Compiled([model], backend=backend)
            else:
                block = model.blocks[0]
                function = torch.compile(type(block).forward, backend=backend, fullgraph=True)
                block.forward = lambda *args, **kwargs: function(block, *args, **kwargs)
            call()

        return compiled_traffic(run)


def rows(videos: tuple[Video, ...] = VIDEOS) -> list[Row]:
    """Account for each way to compute a forward."""
    found: dict[str, list[tuple[float, Traffic]]] = {}
    for video in videos:
        config = released_configs(video.preset)["transformer"]
        bare, layers = bare_seconds(config, video.tokens), config["num_layers"]

        def row(name: str, block: Traffic, rest: Traffic, bare: float = bare, layers: int = layers) -> None:
            seconds = bare + (layers * block.nbytes + rest.nbytes) / BYTE_RATE
            found.setdefault(name, []).append((seconds, block))

        for side in SIDES:
            block, rest = eager(side, video)
            row(f"{side}, eager", block, rest)
            if side == "wan22":
                block, rest = eager(side, video, fused=True)
                row("wan22, fused (the default on a GPU)", block, rest)
            row(f"{side}, compiled", compiled(side, video), rest)  # ours with its head fused
        row("products and attention alone", Traffic(), Traffic())
    return [Row(name, *zip(*values, strict=True)) for name, values in found.items()]


# ---- VAE ----


def decoding(side: str, video: Video, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Return an autoencoder on the fake GPU, ours accelerated, and three latent frames; within `fake_gpu`."""
    config = released_configs(video.preset)["vae"]
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in config.items()}  # theirs adds lists
    with torch.device("meta"):
        model = (AutoencoderKLWan if side == "wan22" else diffusers.AutoencoderKLWan)(**config)
    place(model, dtype)
    if side == "wan22":
        vae_acceleration.accelerate(model)
    return model, torch.empty(1, config["z_dim"], 3, *video.latent_size[1:], device="cuda", dtype=dtype)


def chunk(side: str, video: Video, dtype: torch.dtype, fuse: bool = False) -> Traffic:
    """Return what the kernels beside convolutions do for one of a clip's latent frames that is decoded."""
    with fake_gpu():
        model, z = decoding(side, video, dtype)
        if side == "wan22":
            chunks = model.decode_stream(z)
            for _ in range(2):  # the first and the second are fewer frames, and no history yet
                next(chunks)
            return eager_traffic(lambda: next(chunks), fuse)
        two, three = (eager_traffic(partial(model.decode, z[:, :, :n])) for n in (2, 3))
        return Traffic(three.nbytes - two.nbytes, three.kernels - two.kernels)


def convolution_seconds(video: Video) -> float:
    """Return the time of our convolutions for a clip, in bf16 at the rate of matrix products."""
    counts = []
    with fake_gpu():
        model, z = decoding("wan22", video, torch.bfloat16)
        chunks = model.decode_stream(z)
        for _ in range(3):
            with FlopCounterMode(display=False) as counter:
                next(chunks)
            counts.append(counter.get_total_flops())
    first, second, other = counts
    return (first + second + (video.latent_size[0] - 2) * other) / PRODUCT_RATE


def decoding_table(videos: tuple[Video, ...]) -> str:
    """Lay out, as Markdown, a chunk's gigabytes, its kernels, and the seconds that a clip's bytes take."""
    lines = [
        "| decoding, beside convolutions | | GB a chunk | kernels | s a clip |",
        "|---|---|---|---|---|",
    ]
    for video in videos:
        for dtype, name in DTYPES.items():
            ways = [("wan22", False), ("wan22", True), ("diffusers", False)]
            for side, fuse in ways:
                found = chunk(side, video, dtype, fuse)
                seconds = video.latent_size[0] * found.nbytes / BYTE_RATE
                label = f"{side}, {'fused' if fuse else 'eager'}"
                cells = f"{name} | {found.nbytes / 1e9:.1f} | {found.kernels} | {seconds:.2f}"
                lines.append(f"| {label}, {video.preset.name} {video} | {cells} |")
        alone = f"convolutions alone, {video.preset.name} {video} | bf16"
        lines.append(f"| {alone} | | | {convolution_seconds(video):.2f} |")
    return "\n".join(lines)


# ---- all of it ----


def table(found: list[Row], videos: tuple[Video, ...]) -> str:
    """Lay the rows out as Markdown: seconds, and gigabytes and kernels of a block."""
    heads = [f"{video.preset.name} {video}" for video in videos]
    lines = ["| | " + " | ".join(f"{head} | GB a block | kernels" for head in heads) + " |"]
    lines.append("|---" * (1 + 3 * len(videos)) + "|")
    for row in found:
        cells = [
            f"{seconds:.3f} s | {block.nbytes / 1e9:.2f} | {block.kernels}"
            for seconds, block in zip(row.seconds, row.block, strict=True)
        ]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument("--parts", action="store_true", help="the bytes of each kernel, too")
    options = parser.parse_args()
    videos = VIDEOS[1], VIDEOS[0], VIDEOS[2]
    found = rows(videos)
    print(table(found, videos), "", decoding_table((videos[0], videos[2])), sep="\n")
    if options.parts:
        for row in found:
            print(row.name, {name: round(n / 1e9, 2) for name, n in row.block[0].parts.items()})
    if options.json is not None:
        values = [
            {
                "name": row.name,
                "seconds": dict(zip(map(str, videos), row.seconds, strict=True)),
                "block_bytes": [block.nbytes for block in row.block],
                "block_kernels": [block.kernels for block in row.block],
            }
            for row in found
        ]
        options.json.write_text(json.dumps({"by": "arithmetic", "rows": values}, indent=2) + "\n")


if __name__ == "__main__":
    main()
