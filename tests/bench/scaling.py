"""Guided steps and decodes of the released sizes on several GPUs, beside one of them.

    torchrun --nproc-per-node=8 -m tests.bench.scaling [--device cpu --tiny]

Every layout of the ranks that suits is measured by turns with what one rank does alone. The weights are
random, the same on each rank; those of one expert, so that an 80 GB GPU holds them.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tests.bench.gpu_steps import MAX_TEXT_TOKENS, TINY, TINY_VAE, VIDEOS, Video, lacks, released_configs
from tests.bench.harness import (
    Row,
    Settings,
    by_turns,
    gpu_arguments,
    relative_error,
    report,
    settings_of,
    summary,
)
from tests.bench.transformer import OURS_WIDE, fill, random_weights
from wan22 import AutoencoderKLWan, FlowMatchUniPCScheduler, WanT2VPipeline, WanTransformer3DModel
from wan22.accel.parallel import Layout, Parallel, processes

STEPS = 2


def layouts(ranks: int, heads: int) -> Iterator[Layout]:
    """Yield the layouts of so many ranks that suit so many heads."""
    for cfg in (1, 2):
        for ulysses in range(1, ranks + 1):
            if ranks % (cfg * ulysses) == 0 and heads % ulysses == 0:
                yield Layout(ranks // (cfg * ulysses), ulysses, cfg)


def pipeline(video: Video, device: str, tiny: bool) -> WanT2VPipeline:
    """Return a pipeline of a released size with random bf16 weights, without text encoder."""
    configs = released_configs(video.preset)
    tokens = TINY | {"num_attention_heads": 2} if tiny else {}
    vae_config = configs["vae"] | (TINY_VAE if tiny else {})
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**configs["transformer"] | tokens)
        vae = AutoencoderKLWan(**{n: list(v) if isinstance(v, tuple) else v for n, v in vae_config.items()})
    torch.manual_seed(0)
    fill(transformer, random_weights(transformer, device, torch.bfloat16), OURS_WIDE)
    fill(vae, random_weights(vae, device, torch.bfloat16), ())
    one_expert = video.preset.in_channels == 48
    pipe = WanT2VPipeline(
        None, None, vae, FlowMatchUniPCScheduler(shift=5.0), transformer, expand_timesteps=one_expert
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def scaling(video: Video, settings: Settings, device: str, tiny: bool) -> list[Row]:
    """Compare guided steps in every layout, and the decode, with those of one rank."""
    ranks = dist.get_world_size()
    facts = {"dtype": "bf16", "shape": f"{video}, {video.tokens} tokens"}
    name = f"{video.preset.name}, {ranks} ranks"
    if missing := processes.shared(lacks(40e9, device)):
        return [{"name": name, **facts, "note": missing}]
    pipe = pipeline(video, device, tiny)
    config = pipe.any_transformer.config
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, MAX_TEXT_TOKENS, config.text_dim, generator=generator).bfloat16()
    call: dict[str, Any] = {
        "prompt_embeds": text[:1].to(device),
        "negative_prompt_embeds": text[1:].to(device),
    }
    call |= {"height": video.height, "width": video.width, "num_frames": video.num_frames, "seed": 0}
    call |= {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}

    def alone() -> torch.Tensor:
        return pipe(None, **call).frames

    def decoded() -> list[Any]:
        return list(pipe.frames(latents))

    rows = []
    latents = alone()
    for layout in layouts(ranks, config.num_attention_heads):

        def together(layout: Layout = layout) -> torch.Tensor:
            parallel = Parallel(pipe, layout, vae=False)
            try:
                return alone()
            finally:
                parallel.detach()

        error = relative_error(together().cpu(), latents.cpu())
        row = summary(*by_turns(together, alone, settings.rounds))
        parts = f"cfg {layout.cfg}, ulysses {layout.ulysses}, ring {layout.ring}"
        note = f"{row['ratio'] / ranks:.0%} of {ranks}; difference {error:.1e}"
        rows.append(
            {"name": f"{name}: {STEPS} steps, {parts}", **facts, **row, "difference": error, "note": note}
        )

    def shared_decode() -> list[Any]:
        parallel = Parallel(pipe, Layout(ring=ranks), vae=True)
        try:
            return decoded()
        finally:
            parallel.detach()

    row = summary(*by_turns(shared_decode, decoded, settings.rounds))
    rows.append({"name": f"{name}: decode", **facts, **row, "note": f"{row['ratio'] / ranks:.0%} of {ranks}"})
    return rows


def run(settings: Settings, device: str = "cuda", tiny: bool = False) -> list[Row]:
    """Measure each released size; every rank calls this."""
    videos = VIDEOS[:1] if settings.quick else VIDEOS
    if tiny:
        videos = tuple(replace(video, width=64, height=64, num_frames=9) for video in videos[::2])
    rows = []
    for video in videos:
        rows += scaling(video, replace(settings, rounds=min(settings.rounds, 3)), device, tiny)
        gc.collect()
    return rows


def main() -> None:
    """Measure on the ranks of torchrun; the first one prints."""
    options = gpu_arguments(__doc__).parse_args()
    processes.join()
    rows = run(settings_of(options), options.device, options.tiny)
    if dist.get_rank() == 0:
        report(rows, options.json, other="one rank")


if __name__ == "__main__":
    main()
