"""Previews while a video is made: a file that each one replaces, and a function that receives them."""

import argparse
import time
from pathlib import Path

import torch

from wan22 import Preview, WanT2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a red circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--decoder", type=Path, help="for finer previews: taew2_1 (A14B) or taew2_2 (TI2V-5B)")
parser.add_argument("--seed", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/preview.mp4"))
args = parser.parse_args()

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
options = {"seed": args.seed, "preview_decoder": args.decoder}
start = time.perf_counter()

# A file for a viewer that reloads it: .gif or .webp holds all frames, .png the middle one.
moving = args.output.with_name("preview-now.gif")
video = pipe(args.prompt, preview=moving, **options)


def keep(preview: Preview) -> None:
    """Keep the middle frame of every preview, in a file of its own."""
    file = args.output.with_name(f"preview-step{preview.step:02}.png")
    preview.image.save(file)
    print(f"preview:       {file}, {preview.label}, step {preview.step} of {preview.num_steps}")


pipe(args.prompt, preview=keep, preview_every=5, **options)
seconds = time.perf_counter() - start

(clip,) = video.save(args.output, overwrite=True)
sheet = args.output.with_suffix(".png")
video.contact_sheet().save(sheet)
print(f"preview file:  {moving}")
print(f"recipe:        {video.recipe}")
print(f"video:         {clip}")
print(f"contact sheet: {sheet}")
print(f"time:          {seconds:.1f} s for two videos, without loading")
