"""What a GPU is tried with beside steps and decodes: does all work, does it stall, what float8 costs."""

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from tests.bench.gpu_steps import TINY, TINY_VAE, VIDEOS, released_configs, roofline, small, timed
from tests.bench.harness import Row, Settings, by_turns, relative_error, summary, synchronize
from tests.bench.transformer import OURS_WIDE, fill, random_weights
from wan22 import (
    AutoencoderKLWan,
    FlowMatchUniPCScheduler,
    WanI2VPipeline,
    WanT2VPipeline,
    WanTransformer3DModel,
    tiny_checkpoint,
)
from wan22.accel.planning.costs import forward_flops
from wan22.accel.quantize import quantize

STEPS = 4
MOST_SECONDS = 150  # of the tests that need a GPU
MINIATURES = (("t2v", WanT2VPipeline), ("i2v", WanI2VPipeline), ("ti2v", WanT2VPipeline))


def smoke(settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Make a video with each miniature on the device and on the CPU."""
    for name, cls in MINIATURES:
        here, seconds = _made(cls, name, device)
        error = relative_error(here, _made(cls, name, "cpu")[0])
        yield {
            "name": f"tiny-{name}",
            "dtype": "fp32",
            "ours_s": seconds,
            "difference": error,
            "target": "as on the CPU",
            "met": error < 1e-2,
            "note": f"difference from the CPU {error:.1e}",
        }


def _made(cls: Any, name: str, device: str) -> tuple[torch.Tensor, float]:
    """Return a miniature's frames, made on a device, and the seconds that it took."""
    pipe = cls.from_pretrained(tiny_checkpoint(name), dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    image = [torch.zeros(3, 64, 64)] if cls is WanI2VPipeline else []
    started = time.perf_counter()
    frames = pipe(*image, "a cat", seed=1, num_inference_steps=STEPS, output_type="pt").frames
    return frames, time.perf_counter() - started


def gpu_tests(settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Run the tests that need a GPU; on the CPU they are skipped."""
    chosen = ["tests/pipelines/test_gpu.py"] if tiny else ["tests", "-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
        passed, said = done.returncode == 0, done.stdout.strip().splitlines()[-12:]
    except subprocess.TimeoutExpired:
        passed, said = False, [f"more than {MOST_SECONDS} s"]
    row = {"name": "tests of GPUs", "ours_s": time.perf_counter() - started, "met": passed}
    yield row | {"target": "pass", "note": said[-1] if passed else " / ".join(said)}


def few_steps(settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Make a TI2V-5B clip in few steps, all on the device, and say how long the device waits meanwhile."""
    video = small(VIDEOS[2]) if tiny else VIDEOS[2]
    configs = released_configs(video.preset)
    dtypes = {"transformer": torch.bfloat16, "vae": torch.bfloat16}
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**configs["transformer"] | (TINY if tiny else {}))
        vae = AutoencoderKLWan(**configs["vae"] | (TINY_VAE if tiny else {}))
    fill(transformer, random_weights(transformer, device, dtypes["transformer"]), OURS_WIDE)
    fill(vae, random_weights(vae, device, dtypes["vae"]), ())
    scheduler = FlowMatchUniPCScheduler(shift=video.preset.flow_shift)
    parts = {"tokenizer": None, "text_encoder": None, "transformer_2": None, "scheduler": scheduler}
    pipe = WanT2VPipeline(**parts, transformer=transformer, vae=vae, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    width = transformer.config.text_dim
    embeds = torch.randn(2, 60, width, dtype=torch.bfloat16, device=device).split(1)
    size = {"width": video.width, "height": video.height, "num_frames": video.num_frames}
    call = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "num_inference_steps": STEPS}
    times: list[float] = []

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        times.append(time.perf_counter())  # without waiting for the device, as any caller
        return {}

    def made() -> None:
        times[:] = [time.perf_counter()]
        pipe(**call, **size, callback_on_step_end=after_step)
        times.append(time.perf_counter())

    made()  # warms up, and compiles what is fused
    synchronize()
    made()
    seconds = [after - before for before, after in pairwise(times)]
    row: Row = {"name": f"TI2V-5B, {STEPS} guided steps", "dtype": "bf16", "shape": str(video)}
    row |= {"ours_s": times[-1] - times[0], "steps_s": fmean(seconds[:-1]), "after_steps_s": seconds[-1]}
    row["note"] = f"queued in {row['steps_s']:.3g} s a step, the rest and the frames {seconds[-1]:.3g} s"
    if device != "cpu":
        row["busy"] = busy_share(made)
        row["note"] += f"; the GPU computes or copies {row['busy']:.1%} of the time"
    yield row


def busy_share(call: Any) -> float:
    """Return the share of a call's time in which the GPU computes or copies."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = timed(call)
    spans = sorted((event.time_range.start, event.time_range.end) for event in profiler.events())
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / seconds


@torch.no_grad()
def float8(settings: Settings, device: str, tiny: bool) -> Iterator[Row]:
    """Compare a step of TI2V-5B in float8, as stored and in its products, with the same in bf16."""
    video = small(VIDEOS[2]) if tiny else VIDEOS[2]
    config = released_configs(video.preset)["transformer"] | (TINY if tiny else {})
    latents = torch.randn(1, config["in_channels"], *video.latent_size, device=device)
    text = torch.randn(1, 512, config["text_dim"], device=device, dtype=torch.bfloat16)
    moment = torch.tensor([937.0], device=device)
    for method in ("fp8", "fp8_dynamic"):
        with torch.device("meta"):
            plain, rounded = WanTransformer3DModel(**config), WanTransformer3DModel(**config)
        for model in (plain, rounded):
            fill(model, random_weights(model, device, torch.bfloat16), OURS_WIDE)
        quantize(rounded, method)
        calls = [
            lambda model=model: model(latents, moment, text, return_dict=False)[0]
            for model in (rounded, plain)
        ]
        error = relative_error(*(call().cpu() for call in calls))
        row = {"name": f"TI2V-5B step, {method}, beside bf16", "dtype": "bf16", "shape": str(video)}
        row |= summary(*by_turns(*calls, settings.rounds, settings.clock)) | {"difference": error}
        row |= roofline(forward_flops(plain.config, video.tokens), row["ours_s"], device)
        yield row | {"note": f"the other column is ours in bf16; difference {error:.1e}"}
