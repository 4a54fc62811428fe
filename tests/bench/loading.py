"""Memory and time of loading a transformer of 1.5 GB, beside diffusers' own loader.

    python -m tests.bench.loading

Each loader runs in a process of its own: once with its memory watched, then to be timed. The time is that
until each page of the weights was read once, as loading a mapped file by itself reads nothing. What is
limited is the memory that only the process holds (RssAnon), at its peak, in multiples of the loaded weights;
mapped file pages, which the system drops when it needs them, do not count.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench.harness import Row, Settings, apart, main, summary, watched_memory

# 750 million parameters: 1.5 GB in bfloat16, 3 GB in float32.
SIZES = {
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 12,
    "ffn_dim": 8192,
    "text_dim": 2048,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"))
OURS = {"official file": "wan22 file", "Diffusers folder": "wan22 folder"}
THEIRS = "diffusers folder"
PAGE = 4096
TIMES = 7  # that each process is timed
# Peak memory over the weights' size: in the file's own dtype, and in another one.
LIMITS = {True: 1.05, False: 1.1}


def write(folder: Path, layers: int) -> None:
    """Write the same random weights as a Diffusers folder and as an official file, in both dtypes."""
    from safetensors.torch import save_file

    from wan22 import WanTransformer3DModel
    from wan22.checkpoints.naming.keys import TRANSFORMER

    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES | {"num_layers": layers})
    for name, dtype in reversed(DTYPES.items()):
        weights = {key: w.to(dtype).contiguous() for key, w in model.state_dict().items()}
        folder_of = folder / name
        model.save_config(folder_of)
        save_file(weights, folder_of / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        official = {str(TRANSFORMER.inverse.rename(key)): w for key, w in weights.items()}
        save_file(official, folder / f"{name}.safetensors", {"format": "pt"})


def measure(loader: str, folder: Path, stored: str, asked: str) -> dict[str, float]:
    """Load and read every weight; return median seconds, and GB beyond what the imports took."""
    cls: Any
    if loader == THEIRS:
        from diffusers import WanTransformer3DModel as cls  # noqa: N813
    else:
        from wan22 import WanTransformer3DModel as cls  # noqa: N813

    def load() -> Any:
        if loader == "wan22 file":
            model = cls.from_single_file(folder / f"{stored}.safetensors", dtype=DTYPES[asked])
        else:
            model = cls.from_pretrained(folder / stored, torch_dtype=DTYPES[asked])
        for weight in model.parameters():
            weight.detach().view(torch.uint8).flatten()[::PAGE].sum()
        return model

    with watched_memory() as memory:
        size = sum(p.nbytes for p in load().parameters()) / 1e9
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        model = load()
        seconds.append(time.perf_counter() - start)
        del model  # before the next, in nobody's time
    return {"s": statistics.median(seconds), "peak": memory.peak, "size": size}


def compared(source: str, folder: Path, stored: str, asked: str, rounds: int) -> Row:
    """Load by turns, and return the row."""
    turns = [
        [apart(measure, loader, folder, stored, asked) for loader in (OURS[source], THEIRS)]
        for _ in range(rounds)
    ]
    ours, theirs = zip(*turns, strict=True)
    peaks = [statistics.median(one["peak"] for one in side) for side in (ours, theirs)]
    size, limit = ours[0]["size"], LIMITS[stored == asked]
    return {
        "name": f"loading and first read, {source}",
        "dtype": asked if stored == asked else f"{stored} to {asked}",
        "shape": f"{size:.2f} GB",
        **summary([one["s"] for one in ours], [one["s"] for one in theirs]),
        "target": f"peak <= {limit:g} x size",
        "met": peaks[0] <= limit * size,
        "ours_peak_gb": peaks[0],
        "diffusers_peak_gb": peaks[1],
        "note": f"peak private {peaks[0]:.2f} GB, diffusers {peaks[1]:.2f} GB",
    }


def run(settings: Settings) -> list[Row]:
    """Compare loaders; quick: a twelfth of the weights, cast."""
    rounds = 1 if settings.quick else min(settings.rounds, 3)
    cases = CASES[1:2] if settings.quick else CASES
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), layers=1 if settings.quick else SIZES["num_layers"])
        return [
            compared(source, Path(folder), stored, asked, rounds)
            for stored, asked in cases
            for source in OURS
        ]


if __name__ == "__main__":
    main(run, __doc__)
