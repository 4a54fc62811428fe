"""Encode captioned training clips once, so that training a transformer costs no drawing and encoding.

    python examples/tiny/cache_latents.py --out runs/tiny --vae vae

Writes runs/tiny/latents/00000.pt and so on, 500 clips each; `--vae vae22` writes runs/tiny/latents22 instead.
`--conditions` adds cond-00000.pt and so on: the same clips' first and last frames, as image to video is given
them. Files that are there are kept, so it can be interrupted; training may already read the first ones while
the rest are made.

Axes: n clips, b clips of a batch, c channels, t h w frames, rows, columns (of pixels or latents).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import numpy as np
import torch
from common import arguments, load, save
from train_vae import moments, pixels, speed_up, to_pixels

from wan22 import AutoencoderKLWan

CLIPS_PER_FILE, BATCH = 500, 20
FOLDERS = {"vae": "latents", "vae22": "latents22"}  # of each autoencoder's latents
# Most clips show the motions that must hold.
MOTION_WEIGHTS = {motion: 1.0 if motion in clips.CORE_MOTIONS else 0.2 for motion in clips.MOTIONS}


def draw_clips(n: int, seed: list[int], split: str, size: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Yield n clips in batches "b c t h w" in [-1, 1], with their captions; a seed always gives the same."""
    rng = np.random.default_rng(seed)
    for start in range(0, n, BATCH):
        count = min(BATCH, n - start)
        frames, captions, _ = clips.draw_batch(rng, count, split, weights=MOTION_WEIGHTS, size=size)
        yield to_pixels(frames), captions


def encode(vae: AutoencoderKLWan, x: torch.Tensor) -> torch.Tensor:
    """Encode whole clips "b c t h w" into normalised latents "b c t h w" float16."""
    return vae.normalize_latents(moments(vae, x).chunk(2, dim=1)[0]).half().contiguous()


@torch.inference_mode()
def encode_clips(vae: AutoencoderKLWan, n: int, seed: list[int], split: str) -> dict[str, Any]:
    """Draw and encode clips.

    Args:
        vae: the trained autoencoder.
        n: number of clips.
        seed: seed of scenes, captions and paths.
        split: "train" or "held_out".
    Returns: "latents", normalised, "n c t h w" float16; "captions", n strings.
    """
    latents, captions = [], []
    for x, texts in draw_clips(n, seed, split, pixels(vae)):
        latents.append(encode(vae, x))
        captions += texts
    return {"latents": torch.cat(latents), "captions": captions}


@torch.inference_mode()
def encode_conditions(vae: AutoencoderKLWan, n: int, seed: list[int], split: str) -> dict[str, Any]:
    """Draw the clips of `encode_clips` again, and encode only their given frames, zeros in place of the rest.

    Args: see encode_clips.
    Returns: "first", where the first frame is given, and "both", first and last: "n c t h w" float16.
    Source: Wan2.2 wan/image2video.py, WanI2V.generate.
    """
    first, both = [], []
    for x, _ in draw_clips(n, seed, split, pixels(vae)):
        given = torch.zeros_like(x)
        given[:, :, 0] = x[:, :, 0]
        first.append(encode(vae, given))
        given[:, :, -1] = x[:, :, -1]
        both.append(encode(vae, given))
    return {"first": torch.cat(first), "both": torch.cat(both)}


def read_latents(
    folder: Path, files: str = "[0-9]*.pt", conditions: bool = False
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read all clips of some files of a folder.

    Args:
        folder: folder of the files.
        files: a pattern that their names match.
        conditions: read the given frames, too, and only clips that have them.
    Returns: "latents" and, with conditions, "first" and "both", each "n c t h w" float16; n captions.
    """
    prefix, parts = "cond-" if conditions else "", []
    for path in sorted(folder.glob(prefix + files)):
        part = load(folder / path.name.removeprefix(prefix))
        parts.append(part | load(path) if conditions else part)
    captions = [text for part in parts for text in part.pop("captions")]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, captions


def main() -> None:
    """Write the held-out clips, then the training clips file by file; then their conditions."""
    options = arguments(__doc__, "smoke", "conditions", seed=0, vae="vae", clips=9000)
    n = 8 if options.smoke else CLIPS_PER_FILE
    total = 16 if options.smoke else options.clips
    vae = speed_up(AutoencoderKLWan.from_pretrained(options.out / options.vae).eval())
    folder = options.out / FOLDERS[options.vae]
    folder.mkdir(exist_ok=True)
    jobs = [("held_out.pt", [options.seed, 1], "held_out")]
    jobs += [(f"{i:05}.pt", [options.seed, 0, i], "train") for i in range(total // n)]
    kinds = [("", encode_clips)] + [("cond-", encode_conditions)] * options.conditions
    for prefix, make in kinds:
        for name, seed, split in jobs:
            path = folder / f"{prefix}{name}"
            if not path.exists():
                save(path, make(vae, n, seed, split))
                print(path, flush=True)


if __name__ == "__main__":
    main()
