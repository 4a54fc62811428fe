"""Checkpoints of the released sizes, with random weights: loading, a short video on the CPU, preparing.

    python -m tests.bench.real ti2v-5b [--stored bf16] [--ram 8GB] [--layers N] [--folder DIR] [--json FILE]

Writes the checkpoint (its second expert is linked to the first) to a folder that is deleted at the end,
unless it is given. Each part runs in a process of its own, whose memory is watched: anonymous, pinned, and
that of mapped files, which the system drops when it needs it. Predictions are the plan's.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wan22 import presets, tiny_checkpoint
from wan22.accel.planning.meta_models import released_models, store_as

PRESETS = {"t2v-a14b": presets.T2V_A14B, "ti2v-5b": presets.TI2V_5B, "t2v-1.3b": presets.T2V_1_3B}
STORED = {"float32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = {"transformer", "transformer_2"}
CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
NOISE = (np.random.default_rng(0).standard_normal(2**22) * 0.02).astype(np.float32)
SHARD = 10 * 10**9  # bytes, as in the released repositories
SIZE = {"height": 128, "width": 128, "num_frames": 5}
DTYPE = {"vae": None, "default": torch.bfloat16}
KINDS = {"anonymous": "RssAnon", "pinned": "VmLck", "mapped": "RssFile"}


# ---- the checkpoint ----


def write_checkpoint(folder: Path, name: str, stored: torch.dtype, layers: int | None) -> None:
    """Write a checkpoint in the Diffusers layout; the transformers in a dtype, the others as released."""
    preset = PRESETS[name]
    models = released_models(preset)
    tiny = Path(tiny_checkpoint("ti2v" if preset.in_channels == 48 else "t2v"))
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"boundary_ratio": preset.boundary_ratio}
    index |= {component: [None, None] for component in EXPERTS - models.keys()}
    (folder / "model_index.json").write_text(json.dumps(index))
    for component in EXPERTS - models.keys():
        shutil.rmtree(folder / component, ignore_errors=True)
    for component, model in models.items():
        place = folder / component
        if component == "transformer_2":
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / "transformer", place, copy_function=os.link)
            continue
        if component == "transformer":
            store_as(model, stored, stored)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(stored)
            if layers is not None:
                del model.blocks[layers:]
                model.register_to_config(num_layers=layers)
        tensors = {n: t for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
        (model.config.save_pretrained if component == "text_encoder" else model.save_config)(place)
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        write_shards(place, stem, tensors)


def write_shards(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write random tensors of these shapes and dtypes to files of at most SHARD bytes, and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write random tensors, norms as ones; they begin 8 bytes behind a multiple of 64."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    noise = {dtype: torch.from_numpy(NOISE).to(dtype).view(torch.uint8).numpy() for dtype in CODES}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if "norm" in name and name.endswith(("weight", "gamma")):
                file.write(
                    torch.ones(prod(tensor.shape), dtype=tensor.dtype).view(torch.uint8).numpy().tobytes()
                )
                continue
            for start in range(0, tensor.nbytes, noise[tensor.dtype].nbytes):
                file.write(noise[tensor.dtype][: tensor.nbytes - start].tobytes())


# ---- what is measured ----


def watched(*command: str, **environment: str) -> tuple[dict[str, float], str]:
    """Run a command; return its seconds and its peaks in GB, and what it printed last."""
    peaks, start = dict.fromkeys(KINDS, 0.0), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    while process.poll() is None:
        for kind, gigabytes in memory_of(process.pid).items():
            peaks[kind] = max(peaks[kind], gigabytes)
        time.sleep(0.02)
    output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start} | peaks, output.strip().rpartition("\n")[2]


def memory_of(process: int | str) -> dict[str, float]:
    """Return a process's memory in GB, by kind."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    found = {kind: re.search(rf"{name}:\s+(\d+)", status) for kind, name in KINDS.items()}
    return {kind: int(match[1]) * 1024 / 1e9 for kind, match in found.items() if match}


def load(folder: str, ram: str) -> dict[str, Any]:
    """Load in bf16, and return the seconds and the GB that it took."""
    from wan22 import WanT2VPipeline

    before, start = memory_of("self"), time.perf_counter()
    WanT2VPipeline.from_pretrained(folder, dtype=DTYPE, memory={"ram": ram})
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "anonymous": memory_of("self")["anonymous"] - before["anonymous"]}


def video(folder: str, ram: str) -> dict[str, Any]:
    """Make a short video within host memory, and return what was planned and the seconds of each step."""
    from wan22 import WanT2VPipeline

    pipe = WanT2VPipeline.from_pretrained(folder, dtype=DTYPE, memory={"ram": ram})
    pipe.set_progress_bar_config(disable=True)
    before, times = memory_of("self"), []

    def tick(*_: Any) -> dict[str, Any]:
        times.append(time.perf_counter())
        return {}

    pipe("a cat", seed=0, num_inference_steps=2, **SIZE, callback_on_step_end=tick)
    plan = pipe.memory_plan
    return {
        "before": before["anonymous"],
        "planned": plan.host / 1e9,
        "in files": plan.mapped / 1e9,
        "stay": plan.placements["transformer"].resident_blocks,
        "step": times[1] - times[0],
    }


PARTS = {"load": load, "video": video}
NOTES = {
    "load": "{seconds:.1f} s and {anonymous:.2f} GB of these beyond the imports",
    "video": "planned {planned:.2f} GB beside {before:.2f}, {in files:.1f} GB in files; {stay} blocks stay; "
    "a step {step:.0f} s",
}


def main() -> None:
    """Write a checkpoint, measure each part, print a table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("--stored", choices=STORED, default="float32", help="the transformers' dtype")
    parser.add_argument("--ram", default="8GB", help="host memory of the video, beside mapped files")
    parser.add_argument("--layers", type=int, help="fewer blocks than released")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written and kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](str(options.folder), options.ram)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "checkpoint")
        if not folder.exists():
            write_checkpoint(folder, options.model, STORED[options.stored], options.layers)
        results = measured(folder, Path(temporary, "cache"), options)
    print(f"{'':10} {'seconds':>8} {'anonymous':>10} {'pinned':>7} {'mapped':>7}  GB at their peaks")
    for name, row in results.items():
        numbers = f"{row['seconds']:8.1f} {row['anonymous']:10.2f} {row['pinned']:7.2f} {row['mapped']:7.2f}"
        print(f"{name:10} {numbers}  {row['note']}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measured(folder: Path, cache: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the parts one after the other."""
    command = [sys.executable, "-m", "tests.bench.real", options.model, "--folder", str(folder)]
    command += ["--ram", options.ram, "--part"]
    results: dict[str, dict[str, Any]] = {}

    def run(name: str, part: str, **environment: str) -> None:
        results[name], output = watched(*command, part, **environment)
        facts = json.loads(output)
        results[name] |= {"facts": facts, "note": NOTES[part].format(**facts)}

    run("load", "load")
    run("video", "video")
    if options.stored == "float32":
        prepare = [sys.executable, "-m", "wan22.cli", "prepare", str(folder), "--yes"]
        results["prepare"] = watched(*prepare, WAN22_CACHE=str(cache))[0] | {"note": "once"}
        run("prepared", "video", WAN22_CACHE=str(cache))
    return results


if __name__ == "__main__":
    main()
