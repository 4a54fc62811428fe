"""Memory and time of loading a transformer of 1.5 GB, beside diffusers' own loader.

    python -m tests.bench.loading

Each case runs in a process of its own. "private" is memory that only the process holds (RssAnon), at its peak
and when all is loaded; mapped file pages, which the system drops when it needs them, do not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

# 750 million parameters: 1.5 GB in bfloat16, 3 GB in float32.
SIZES = {
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 12,
    "ffn_dim": 8192,
    "text_dim": 2048,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = [(who, stored, asked) for stored, asked in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"))
         for who in ("wan22, official file", "wan22, folder", "diffusers, folder")]  # fmt: skip


def write(folder: Path) -> None:
    """Write the same random weights as a Diffusers folder and as an official file, in both dtypes."""
    from safetensors.torch import save_file

    from wan22 import WanTransformer3DModel
    from wan22.checkpoints.keys import TRANSFORMER

    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES)
    for name, dtype in reversed(DTYPES.items()):
        weights = {key: w.to(dtype).contiguous() for key, w in model.state_dict().items()}
        folder_of = folder / name
        model.save_config(folder_of)
        save_file(weights, folder_of / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        official = {str(TRANSFORMER.inverse.rename(key)): w for key, w in weights.items()}
        save_file(official, folder / f"{name}.safetensors", {"format": "pt"})


def private() -> float:
    """Return this process's own memory in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def load(who: str, folder: Path, stored: str, asked: str) -> dict[str, float]:
    """Load once; return seconds and GB beyond what the imports took."""
    if who.startswith("diffusers"):
        from diffusers import WanTransformer3DModel
    else:
        from wan22 import WanTransformer3DModel  # type: ignore[assignment]
    before, peak, done = private(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if "official" in who:
        model = WanTransformer3DModel.from_single_file(folder / f"{stored}.safetensors", dtype=DTYPES[asked])
    else:
        model = WanTransformer3DModel.from_pretrained(folder / stored, torch_dtype=DTYPES[asked])
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(p.nbytes for p in model.parameters()) / 1e9
    return {"s": seconds, "peak": max(peak[0], private()) - before, "after": private() - before, "size": size}


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        who, folder, stored, asked = options.case
        print(json.dumps(load(who, Path(folder), stored, asked)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        print(f"{'':22} {'file':>5} {'asked':>6} {'model':>8} {'peak private':>13} {'after':>8} {'time':>8}")
        for who, stored, asked in CASES:
            command = [sys.executable, "-m", "tests.bench.loading", "--case", who, folder, stored, asked]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            r = json.loads(run.stdout.splitlines()[-1])
            gigabytes = f"{r['size']:5.2f} GB {r['peak']:10.2f} GB {r['after']:5.2f} GB"
            print(f"{who:22} {stored:>5} {asked:>6} {gigabytes} {r['s']:6.1f} s")


if __name__ == "__main__":
    main()
