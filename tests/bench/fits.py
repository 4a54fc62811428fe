"""What fits where, by the planner: devices and hosts of common sizes, checkpoints as they are stored.

    python -m tests.bench.fits [--only NAME …]

Nothing is measured: memory is counted by the planner, which other tests hold against measurements, and times
are arithmetic at the RATES.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from wan22 import presets
from wan22.accel.offload.layout import blocks_of
from wan22.accel.planning.costs import Task
from wan22.accel.planning.machine import CONTEXT, GB, Machine
from wan22.accel.planning.meta_models import released_models
from wan22.accel.planning.passes import GUIDED
from wan22.accel.planning.planner import _candidates
from wan22.accel.planning.plans import Plan
from wan22.accel.quantize import quantize
from wan22.checkpoints.files.quantized import GgufBlocks, QuantizedTensor
from wan22.checkpoints.quantized_linear import QuantizedLinear

DEVICES, HOSTS = (6, 8, 12, 16, 24, 32, 48, 80), (16, 32, 64)
# Products in bf16, copies from the host, reads from a disk: about a recent card, PCIe 4, and NVMe.
RATES = {"flops": 80e12, "bandwidth": 25e9, "disk": 3e9}
# Of a host's memory, what is left to the system and other programs.
OTHERS = 2 * GB
# Bytes of 256 values in Q4_K.
BLOCK, BLOCK_BYTES = 256, 144
STORED = ("float32", "bf16", "fp8", "GGUF Q4")


@dataclass(frozen=True)
class Case:
    """A checkpoint's videos of one size."""

    name: str
    preset: presets.Preset
    size: tuple[int, int, int]  # width, height, frames
    image: bool = False


CASES = (
    Case("A14B 480p", presets.T2V_A14B, (832, 480, 81)),
    Case("A14B 720p", presets.T2V_A14B, (1280, 720, 81)),
    Case("TI2V-5B 704p", presets.TI2V_5B, (1280, 704, 121)),
    Case("1.3B 480p", presets.T2V_1_3B, (832, 480, 81)),
)


def task_of(case: Case, stored: str) -> Task:
    """Return a case's task: models on the meta device as they compute, and their bytes in files."""
    models = released_models(case.preset)
    experts = [models[name] for name in ("transformer", "transformer_2") if name in models]
    in_files = {}
    for name, model in models.items():
        if stored == "float32" and model in experts:
            in_files[name] = sum(4 * p.numel() for p in model.parameters())
    for model in experts:
        if stored == "fp8":
            quantize(model, "fp8")
        elif stored == "GGUF Q4":
            store_in_blocks(model)
    return Task(case.name, models, case.size, None, GUIDED, stored=in_files)


def store_in_blocks(model: nn.Module) -> None:
    """Let the blocks' large layers be as a file in Q4_K holds them."""
    for block in blocks_of(model):
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and layer.in_features % BLOCK == 0:
                shape = tuple(layer.weight.shape)
                data = torch.empty(
                    shape[0], shape[1] // BLOCK * BLOCK_BYTES, dtype=torch.uint8, device="meta"
                )
                weight = QuantizedTensor(shape, GgufBlocks("Q4_K", shape), {"data": data})
                parent, _, attribute = path.rpartition(".")
                setattr(
                    block.get_submodule(parent),
                    attribute,
                    QuantizedLinear(weight, layer.bias, torch.bfloat16),
                )


def plan_for(task: Task, device: float, host: float) -> Plan | None:
    """Return the fastest plan for so many bytes of a device and a host; None: nothing fits."""
    machine = Machine(torch.device("cuda"), device - CONTEXT, host - OTHERS, **RATES)
    return next((plan for plan in _candidates(task, machine) if plan.fits), None)


def described(plan: Plan | None) -> str:
    """Return a cell: blocks of a transformer that stay, strips S of the VAE, parts P of the tokens."""
    if plan is None:
        return "–"
    placement = plan.placements["transformer"]
    whole = {"resident": "all", "on_demand": "one model"}
    strips = "" if plan.strips is None else f" S{plan.strips}"
    parts = "" if plan.token_chunks == 1 else f" P{plan.token_chunks}"
    return whole.get(placement.kind, str(placement.resident_blocks)) + strips + parts


def main() -> None:
    """Print a row for each case, way of storing, and host that makes a difference."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="+", default=STORED, choices=STORED)
    options = parser.parse_args()
    print("| | stored as | host | a step |" + "".join(f" {d} GB |" for d in DEVICES))
    print("|---|---|---|---|" + "---|" * len(DEVICES))
    for case in CASES:
        for stored in options.only:
            task = task_of(case, stored)
            rows: dict[str, list[str]] = {}  # hosts with the same cells share a row
            for host in HOSTS:
                plans = [plan_for(task, device * GB, host * GB) for device in DEVICES]
                seconds = [plan.step_seconds or 0 for plan in plans if plan is not None]
                times = dict.fromkeys(f"{edge(seconds):.0f}" for edge in (min, max))
                cells = " | ".join([f"{' to '.join(times)} s", *map(described, plans)])
                rows.setdefault(cells, []).append(str(host))
            for cells, hosts in rows.items():
                print(f"| {case.name} | {stored} | {', '.join(hosts)} GB | {cells} |", flush=True)


if __name__ == "__main__":
    main()
