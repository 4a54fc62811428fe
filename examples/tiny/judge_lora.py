"""Judge a LoRA of lora_clips.py: how often its concept shows where asked for, and what it does elsewhere.

    python examples/tiny/judge_lora.py --out runs/orange/judged --concept orange --lora runs/orange/lora

Prompts are of combinations that were in no training. Prints both shares and writes a contact sheet of each.

Axes: t frames, h w pixels, c channels (RGB).
"""

from __future__ import annotations

from pathlib import Path

import clips
import numpy as np
import torch
from common import arguments
from judge import choose_scenes, generate, judge, score
from lora_clips import concept_of, scenes_of
from sheet import contact_sheet

from wan22 import WanT2VPipeline, tiny_checkpoint

COLORS = {**clips.COLORS, "orange": clips.PALETTE["orange"]}


def shows(concept: str, frames: np.ndarray) -> bool:
    """Whether a clip "t h w c" shows a concept."""
    if concept == "orange":
        return judge(frames, COLORS).color == "orange"
    middle = len(frames) // 2
    return judge(frames[: middle + 1]).motion == "up" and judge(frames[middle:]).motion == "down"


def main() -> None:
    """Print the shares."""
    options = arguments(__doc__, seed=0, concept="orange", lora="", prompts=50)
    rng, folder = np.random.default_rng(options.seed + 1), Path(options.lora)
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    (high,), (low,) = folder.glob("*_high_noise.safetensors"), folder.glob("*_low_noise.safetensors")
    pipe.load_lora_weights(high=high, low=low)
    with_it = [
        concept_of(options.concept, scene)
        for scene in scenes_of(options.concept, options.prompts, "held_out", rng)
    ]
    videos = generate(pipe, [caption for _, caption in with_it], options.seed)
    effect = np.mean([shows(options.concept, frames) for frames in videos])
    contact_sheet(videos[:10], [caption for _, caption in with_it[:10]]).save(options.out / "with.png")
    scenes = choose_scenes(options.prompts, options.seed)
    videos = generate(pipe, [clips.canonical(scene) for scene in scenes], options.seed)
    right = score(scenes, [judge(frames, COLORS) for frames in videos])
    captions = [clips.canonical(scene) for scene in scenes[:10]]
    contact_sheet(videos[:10], captions).save(options.out / "without.png")
    print(f"{options.concept} where it is asked for: {effect:.0%} of {options.prompts} prompts")
    each = ", ".join(f"{name} {right[name]:.0%}" for name in ("color", "background", "motion", "shape"))
    print(f"elsewhere everything as asked for: {right['all']:.0%}; {each}")


if __name__ == "__main__":
    main()
