"""A prompt becomes a video. Without arguments it runs the miniature checkpoint that ships with wan22."""

import argparse
import time
from pathlib import Path

import torch

from wan22 import WanT2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a red circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--seed", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/text_to_video.mp4"))
args = parser.parse_args()

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
start = time.perf_counter()
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
video = pipe(args.prompt, seed=args.seed)
seconds = time.perf_counter() - start

(clip,) = video.save(args.output, overwrite=True)
sheet = args.output.with_suffix(".png")
video.contact_sheet().save(sheet)
print(f"prompt:        {args.prompt}")
print(f"recipe:        {video.recipe}")
print(f"video:         {clip}")
print(f"contact sheet: {sheet}")
print(f"time:          {seconds:.1f} s, loading included")
