"""Many prompts with several seeds each, loaded once. Every file carries its recipe."""

import argparse
import time
from pathlib import Path

import torch

from wan22 import WanT2VPipeline, read_recipe, tiny_checkpoint

PROMPTS = [
    "a red circle moves to the right on a blue background",
    "a yellow square moves up on a green background",
    "a white triangle moves to the left on a black background",
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompts", nargs="*", default=PROMPTS, help="texts, or one file with a prompt per line")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
parser.add_argument("--output", type=Path, default=Path("outputs/batch"), help="folder")
args = parser.parse_args()
if len(args.prompts) == 1 and Path(args.prompts[0]).is_file():
    args.prompts = [line for line in Path(args.prompts[0]).read_text().splitlines() if line.strip()]

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
start = time.perf_counter()
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
files = []
for number, prompt in enumerate(args.prompts, 1):
    for seed in args.seeds:
        # One at a time, in the memory of one. pipe(args.prompts) makes the same videos at once.
        video = pipe(prompt, seed=seed)
        files += video.save(args.output / f"{number:02}-seed{seed}.mp4", overwrite=True)
        video.contact_sheet().save(files[-1].with_suffix(".png"))
seconds = time.perf_counter() - start

for file in files:
    recipe = read_recipe(file)
    print(f"video:         {file}")
    print(f"recipe:        seed {recipe.seeds[0]}, {recipe.prompts[0]}")
# pipe.reproduce(file) makes the video of a file again.
print(f"time:          {seconds:.1f} s for {len(files)} videos, loading included")
