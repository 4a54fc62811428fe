"""Fit the map from an autoencoder's latents to colours, for previews.

python conversion/fit_latent_rgb.py t2v --products
python conversion/fit_latent_rgb.py Wan2.1_VAE.pth --images photos

Prints an entry for wan22/models/latent_rgb.json, and how much of the colours' variance it explains.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wan22 import AutoencoderKLWan, tiny_checkpoint
from wan22.models.latent_rgb import LatentRGB, fit_latent_rgb

TINY = ("t2v", "ti2v")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those it was called with.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vae", help="folder or file of the autoencoder, or a miniature's name")
    parser.add_argument("--images", type=Path, help="folder of images (default: the miniatures' clips)")
    parser.add_argument("--clips", type=int, default=100, help="how many of these (default: %(default)s)")
    parser.add_argument("--products", action="store_true", help="fit products of latents, too")
    parser.add_argument("--name", help="of the family (default: the autoencoder's)")
    options = parser.parse_args(arguments)
    try:
        folder = tiny_checkpoint(options.vae) / "vae" if options.vae in TINY else Path(options.vae)
        vae = AutoencoderKLWan.from_pretrained(folder, dtype=torch.float32)
        images, stride = options.images, vae.spatial_stride
        videos = read_images(images, stride) if images else draw_clips(stride, options.clips)
        what = str(images or f"{options.clips} clips of examples/tiny/clips.py")
        source = f"fitted by conversion/fit_latent_rgb.py to {what}"
        found, explained = fit_latent_rgb(vae, videos, source, options.products)
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(as_json(found, options.name or str(options.vae)))
    print(f"explained variance: {explained:.4f}", file=sys.stderr)


def read_images(folder: Path, stride: int) -> Iterator[torch.Tensor]:
    """Yield a folder's images as clips of one frame, "1 h w 3", cut to whole latent cells."""
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES):
        image = np.array(Image.open(path).convert("RGB"))
        h, w = (length // stride * stride for length in image.shape[:2])
        if h and w:
            yield torch.from_numpy(image[None, :h, :w])


def draw_clips(stride: int, count: int) -> Iterator[torch.Tensor]:
    """Yield clips as the miniatures were trained on, "t h w 3"."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny"))
    import clips

    rng, size = np.random.default_rng(0), clips.SIZE * stride // 8
    for _ in range(count):
        yield torch.from_numpy(clips.draw_batch(rng, 1, size=size)[0][0])


def as_json(found: LatentRGB, name: str) -> str:
    """Return a map as an entry of the table, one line for each list of numbers."""
    lines = []
    for key, value in (asdict(found) | {"name": name}).items():
        text = json.dumps(value)
        if key in ("factors", "products") and value:
            rows = ",\n      ".join(json.dumps(row) for row in value)
            text = f"[\n      {rows}\n    ]"
        lines.append(f"    {json.dumps(key)}: {text}")
    return "  {\n" + ",\n".join(lines) + "\n  }"


if __name__ == "__main__":
    main()
