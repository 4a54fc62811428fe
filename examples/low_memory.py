"""A video in little memory: memory= is a budget, quantize= makes the weights smaller.

memory="auto" takes the free memory, "12GB" that much of a GPU: models, or their blocks, are moved to the GPU
when they are needed, and the video stays the same. quantize="fp8" or "int8" halves bf16 transformers, and the
video changes. Without a GPU, "auto" checks that the host's memory is enough.
"""

import argparse
import time
from pathlib import Path

import torch

from wan22 import WanT2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a red circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--memory", default="auto", help='"auto", or GPU memory such as "12GB"')
parser.add_argument("--quantize", default="int8", choices=["none", "int8", "fp8", "fp8_dynamic"])
parser.add_argument("--seed", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/low_memory.mp4"))
args = parser.parse_args()

# bf16 is quick on a GPU, float32 on most CPUs. There is no .to("cuda"): the plan moves the models.
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
quantize = None if args.quantize == "none" else args.quantize
start = time.perf_counter()
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype, memory=args.memory, quantize=quantize)
video = pipe(args.prompt, seed=args.seed)
seconds = time.perf_counter() - start

(clip,) = video.save(args.output, overwrite=True)
sheet = args.output.with_suffix(".png")
video.contact_sheet().save(sheet)
print(f"plan:          {pipe.memory_plan}\n")
print(f"prompt:        {args.prompt}")
print(f"transformer:   {pipe.components['transformer'].get_memory_footprint() / 1e6:.2f} MB each")
print(f"recipe:        {video.recipe}")
print(f"video:         {clip}")
print(f"contact sheet: {sheet}")
print(f"time:          {seconds:.1f} s, loading included")
