"""One video on all GPUs: torchrun --nproc-per-node=4 examples/multi_gpu.py "a prompt".

Each rank computes its share and the first one saves; with one process it is a script like any other. --cfg,
--ulysses and --ring set the layout, their product is the number of ranks; the default sends the least.
--fsdp shards the weights, for GPUs that whole ones would fill.
"""

import argparse
import time
from pathlib import Path

import torch

from wan22 import WanT2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a red circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--cfg", type=int, help="2: each pass of guidance on half of the ranks")
parser.add_argument("--ulysses", type=int, help="ranks that exchange tokens for heads")
parser.add_argument("--ring", type=int, help="ranks that pass keys and values around")
parser.add_argument("--fsdp", action="store_true", default=None, help="each rank keeps a part of the weights")
parser.add_argument("--seed", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/multi_gpu.mp4"))
args = parser.parse_args()

# bf16 is quick on a GPU, float32 on most CPUs. There is no .to("cuda"): each rank has a GPU of its own.
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
shares = {name: getattr(args, name) for name in ("cfg", "ulysses", "ring", "fsdp")}
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype, parallel=shares)
start = time.perf_counter()
video = pipe(args.prompt, seed=args.seed)  # the same on every rank, noise included
seconds = time.perf_counter() - start

files = video.save(args.output, overwrite=True)  # written by the first rank; the others get no names
if files:
    sheet = args.output.with_suffix(".png")
    video.contact_sheet().save(sheet)
    print(f"ranks:         {pipe.parallel or 1}")
    print(f"prompt:        {args.prompt}")
    print(f"recipe:        {video.recipe}")
    print(f"video:         {files[0]}")
    print(f"contact sheet: {sheet}")
    print(f"time:          {seconds:.1f} s")
