"""Draw a data set for a LoRA of the embedded text-to-video checkpoint: a colour or a motion that it lacks.

    python examples/tiny/lora_clips.py --out runs/orange/clips --concept orange
    wan22 cache runs/orange/clips
    wan22 train --model tiny-t2v --data runs/orange/clips-cache --output runs/orange/lora …

Half of the clips show the concept, the others what the checkpoint draws already, so that it is not forgotten.
Each is an .mp4 with a .txt beside it.

Axes: t frames, h w pixels, c channels (RGB).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import clips
import numpy as np
from clips import Scene
from common import arguments

from wan22.video import writers

JUMP = (18.0, 26.0)  # pixels of a 64-pixel frame
CONCEPTS = ("orange", "jump")


def concept_of(concept: str, scene: Scene) -> tuple[Scene, str]:
    """Return a scene with a concept in it, and its caption."""
    if concept == "orange":
        scene = replace(scene, color="orange")
        return scene, clips.canonical(scene)
    still = replace(scene, motion="still")
    return still, clips.canonical(still).replace("stays still", "jumps")


def jumping(track: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Let a shape at rest, its track "t 3" in pixels of a 64-pixel frame, jump up and come down again."""
    height = rng.uniform(*JUMP)
    radius = track[0, 2]
    ground = rng.uniform(radius + clips.MARGIN + height, clips.SIZE - radius - clips.MARGIN)
    times = np.linspace(0, 1, len(track))
    return np.column_stack([track[:, 0], ground - height * 4 * times * (1 - times), track[:, 2]])


def draw(concept: str, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a clip with a concept in it: uint8 frames, "t h w c"."""
    if concept == "orange":
        return clips.draw(scene, rng)
    return clips.draw_track(scene, jumping(clips.path("still", rng), rng))


def scenes_of(concept: str, n: int, split: str, rng: np.random.Generator) -> list[Scene]:
    """Choose scenes for the concept: of all motions at rest or along an axis, each as often."""
    scenes = [s for s in clips.all_scenes(split) if s.motion in clips.CORE_MOTIONS]
    if concept == "jump":
        scenes = [s for s in scenes if s.motion == "still"]
    return [scenes[i] for i in rng.integers(len(scenes), size=n)]


def write(folder: Path, name: str, frames: np.ndarray, caption: str) -> None:
    """Write a clip and its caption."""
    writers.write(frames, folder / f"{name}.mp4", clips.FPS, quality=100)
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    """Write the clips."""
    options = arguments(__doc__, seed=0, concept="orange", clips=400)
    rng = np.random.default_rng(options.seed)
    for number, scene in enumerate(scenes_of(options.concept, options.clips // 2, "train", rng)):
        scene, caption = concept_of(options.concept, scene)
        write(options.out, f"{options.concept}-{number:03}", draw(options.concept, scene, rng), caption)
    weights = {m: 1.0 for m in clips.CORE_MOTIONS}
    ordinary = clips.draw_batch(rng, options.clips // 2, motions=clips.CORE_MOTIONS, weights=weights)
    for number, (frames, caption) in enumerate(zip(*ordinary[:2], strict=True)):
        write(options.out, f"ordinary-{number:03}", frames, caption)


if __name__ == "__main__":
    main()
