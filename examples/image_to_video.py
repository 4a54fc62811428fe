"""An image becomes a video. Without arguments it draws one for the miniature checkpoint inside wan22."""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from wan22 import WanI2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", nargs="?", type=Path, help="file; drawn if not given")
parser.add_argument("--prompt", default="a white triangle moves to the left on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("i2v"), help="folder or hub repository")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("outputs/image_to_video.mp4"))
args = parser.parse_args()

if args.image is None:
    args.image = args.output.with_name("image.png")
    args.image.parent.mkdir(parents=True, exist_ok=True)
    drawing = Image.new("RGB", (256, 256), (30, 60, 220))
    ImageDraw.Draw(drawing).polygon([(172, 76), (126, 157), (218, 157)], fill=(245, 245, 245))
    drawing.save(args.image)

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
start = time.perf_counter()
pipe = WanI2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
video = pipe(args.image, args.prompt, seed=args.seed)
seconds = time.perf_counter() - start

(clip,) = video.save(args.output, overwrite=True)
sheet = args.output.with_suffix(".png")
video.contact_sheet().save(sheet)
print(f"image:         {args.image}")
print(f"prompt:        {args.prompt}")
print(f"recipe:        {video.recipe}")
print(f"video:         {clip}")
print(f"contact sheet: {sheet}")
print(f"time:          {seconds:.1f} s, loading included")
