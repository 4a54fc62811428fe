"""T2V-A14B at 480p in budgets of GPU memory: what the planner predicts, and what a run then takes.

    python -m tests.bench.budgets [--device cpu --tiny]

PyTorch is held to each budget (set_per_process_memory_fraction), so that a run which takes more fails. The
weights are random; the embeddings of the prompts are given, and no text encoder is loaded.
"""

import time
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from tests.bench.gpu_steps import TINY, TINY_VAE, VIDEOS, released_configs
from tests.bench.harness import Row, Settings, apart, main_on_gpu, synchronize, watched_memory
from tests.bench.transformer import OURS_WIDE, fill, random_weights
from wan22 import AutoencoderKLWan, FlowMatchUniPCScheduler, WanT2VPipeline, WanTransformer3DModel
from wan22.accel import plan
from wan22.accel.planning.machine import CONTEXT, GB
from wan22.checks import parse_bytes

VIDEO = VIDEOS[0]
BUDGETS = ("12GB", "16GB", "24GB")
STEPS = 4  # three of the high-noise expert, one of the other


def transformer(config: dict[str, Any]) -> WanTransformer3DModel:
    """Return a bf16 transformer on the host whose layers have the same random weights, each its own copy."""
    with torch.device("meta"):
        model, short = WanTransformer3DModel(**config), WanTransformer3DModel(**config | {"num_layers": 1})
    drawn, weights = random_weights(short, "cpu", torch.bfloat16), {}
    for name, w in drawn.items():
        of_block = name.removeprefix("blocks.0.")
        copies = [name] if of_block == name else [f"blocks.{i}.{of_block}" for i in range(len(model.blocks))]
        weights |= {copy: w.clone() for copy in copies}
    fill(model, weights, OURS_WIDE)
    return model


def pipeline(tiny: bool) -> WanT2VPipeline:
    """Return T2V-A14B with random weights on the host."""
    configs = released_configs(VIDEO.preset)
    config = configs["transformer"] | (TINY if tiny else {})
    with torch.device("meta"):
        vae = AutoencoderKLWan(**configs["vae"] | (TINY_VAE if tiny else {}))
    fill(vae, random_weights(vae, "cpu", torch.float32), ())
    return WanT2VPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchUniPCScheduler(shift=VIDEO.preset.flow_shift),
        transformer=transformer(config),
        transformer_2=transformer(config),
        boundary_ratio=VIDEO.preset.boundary_ratio,
    )


def within(budget: str, device: str, tiny: bool) -> Row:
    """Plan for a budget, make a video in it, and return the row."""
    size = {"width": 64, "height": 64, "num_frames": 9}
    if not tiny:
        size = {"width": VIDEO.width, "height": VIDEO.height, "num_frames": VIDEO.num_frames}
    limits: dict[str, Any] = {"device": device}
    if device != "cpu":
        limits["vram"] = budget
        total = torch.cuda.get_device_properties(device).total_memory
        # The context is part of the budget, but nothing that PyTorch counts.
        torch.cuda.set_per_process_memory_fraction((parse_bytes(budget) - CONTEXT) / total)
    pipe = pipeline(tiny)
    made = plan(pipe, **size, **limits)
    width = pipe.transformer.config.text_dim
    embeds = torch.randn(2, 60, width, dtype=torch.bfloat16).split(1)
    row = {
        "name": f"T2V-A14B in {budget}",
        "dtype": "bf16",
        "shape": "{width}x{height}x{num_frames}, ".format(**size) + f"{STEPS} steps",
        "target": f"runs in {budget}",
        "predicted_peak_gb": made.device_peak / GB,
        "predicted_step_s": made.step_seconds,
    }
    with watched_memory(device) as memory:
        pipe.apply(made)
        times = [time.perf_counter()]

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            synchronize()
            times.append(time.perf_counter())
            return {}

        inputs = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        try:
            pipe(**inputs, num_inference_steps=STEPS, callback_on_step_end=after_step, **size)
        except torch.OutOfMemoryError as error:
            return row | {"met": False, "note": str(error).partition(".")[0]}
        times.append(time.perf_counter())
    # The first step waits for what is copied before it, and for pinning; the last entry is decoding.
    seconds = [after - before for before, after in pairwise(times)]
    row |= {"first_step_s": seconds[0], "next_steps_s": fmean(seconds[1:-1]), "decode_s": seconds[-1]}
    peaks = f"peak {memory.peak:.2f} GB, predicted {row['predicted_peak_gb']:.2f} GB; first step "
    peaks += "{first_step_s:.3g} s, each of the next {next_steps_s:.3g} s, decoding {decode_s:.3g} s".format(
        **row
    )
    return row | {"met": True, "ours_s": times[-1] - times[0], "measured_peak_gb": memory.peak, "note": peaks}


def run(settings: Settings, device: str = "cuda", tiny: bool = False) -> list[Row]:
    """Make a video in each budget, in a process of its own; quick: in the smallest."""
    return [apart(within, budget, device, tiny) for budget in BUDGETS[: 1 if settings.quick else None]]


if __name__ == "__main__":
    main_on_gpu(run, __doc__)
