"""Encode captioned training clips once, so that training the transformer costs no drawing and encoding.

    python examples/tiny/cache_latents.py --out runs/tiny

Writes runs/tiny/latents/00000.pt and so on, 500 clips each. Files that are there are kept, so it can be
interrupted; training may already read the first ones while the rest are made.
"""

from __future__ import annotations

from pathlib import Path

import clips
import numpy as np
import torch
from common import arguments, load, save
from train_vae import moments, speed_up, to_pixels

from wan22 import AutoencoderKLWan

CLIPS_PER_FILE, BATCH = 500, 20
# Most clips show the motions that must hold.
MOTION_WEIGHTS = {motion: 1.0 if motion in clips.CORE_MOTIONS else 0.2 for motion in clips.MOTIONS}


@torch.inference_mode()
def encode_clips(vae: AutoencoderKLWan, n: int, seed: list[int], split: str) -> dict[str, object]:
    """Draw and encode clips.

    Args:
        vae: the trained autoencoder.
        n: number of clips.
        seed: of scenes, captions and paths.
        split: "train" or "held_out".
    Returns: "latents", normalised, "n c t h w" float16; "captions", n strings.
    """
    rng = np.random.default_rng(seed)
    latents, captions = [], []
    for start in range(0, n, BATCH):
        frames, texts, _ = clips.draw_batch(rng, min(BATCH, n - start), split, weights=MOTION_WEIGHTS)
        mean = moments(vae, to_pixels(frames)).chunk(2, dim=1)[0]
        latents.append(vae.normalize_latents(mean).half().contiguous())
        captions += texts
    return {"latents": torch.cat(latents), "captions": captions}


def read_latents(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Read all files of training clips in a folder: latents "n c t h w" and captions."""
    parts = [load(path) for path in sorted(folder.glob("[0-9]*.pt"))]
    return torch.cat([p["latents"] for p in parts]), [text for p in parts for text in p["captions"]]


def main() -> None:
    """Write the held-out clips, then the training clips file by file."""
    options = arguments(__doc__, "smoke", seed=0, clips=9000)
    n = 8 if options.smoke else CLIPS_PER_FILE
    total = 16 if options.smoke else options.clips
    vae = speed_up(AutoencoderKLWan.from_pretrained(options.out / "vae").eval())
    folder = options.out / "latents"
    folder.mkdir(exist_ok=True)
    jobs = [(folder / "held_out.pt", [options.seed, 1], "held_out")]
    jobs += [(folder / f"{i:05}.pt", [options.seed, 0, i], "train") for i in range(total // n)]
    for path, seed, split in jobs:
        if not path.exists():
            save(path, encode_clips(vae, n, seed, split))
            print(path, flush=True)


if __name__ == "__main__":
    main()
