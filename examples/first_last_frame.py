"""A video from a first to a last frame. Without arguments it draws both for the miniature checkpoint."""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from wan22 import WanI2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", nargs="*", type=Path, help="two files, first and last; drawn if not given")
parser.add_argument("--prompt", default="a yellow circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("i2v"), help="folder or hub repository")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("outputs/first_last_frame.mp4"))
args = parser.parse_args()

if not args.images:
    args.images = [args.output.with_name(f"{name}.png") for name in ("first", "last")]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for file, x in zip(args.images, (70, 186), strict=True):
        drawing = Image.new("RGB", (256, 256), (30, 60, 220))
        ImageDraw.Draw(drawing).ellipse([x - 40, 88, x + 40, 168], fill=(250, 220, 30))
        drawing.save(file)
first, last = args.images

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
start = time.perf_counter()
pipe = WanI2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
video = pipe(first, args.prompt, last_image=last, seed=args.seed)
seconds = time.perf_counter() - start

(clip,) = video.save(args.output, overwrite=True)
sheet = args.output.with_suffix(".png")
video.contact_sheet().save(sheet)
print(f"images:        {first}, {last}")
print(f"prompt:        {args.prompt}")
print(f"recipe:        {video.recipe}")
print(f"video:         {clip}")
print(f"contact sheet: {sheet}")
print(f"time:          {seconds:.1f} s, loading included")
