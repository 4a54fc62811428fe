"""A video in four steps without guidance, by distilled="lightning-4" and a LoRA that was distilled to it.

For T2V-A14B give --checkpoint Wan-AI/Wan2.2-T2V-A14B-Diffusers with --high and --low, Lightning's two files.
The miniature checkpoint is not distilled, and there is no such LoRA for it: without arguments this shows the
call and its speed, not what a distilled checkpoint would make of it.
"""

import argparse
import time
from pathlib import Path

import torch

from wan22 import WanT2VPipeline, tiny_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a red circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--high", type=Path, help="such as high_noise_model.safetensors")
parser.add_argument("--low", type=Path, help="such as low_noise_model.safetensors")
parser.add_argument("--seed", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/few_steps.mp4"))
args = parser.parse_args()

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
if args.high or args.low:
    pipe.load_lora_weights(high=args.high, low=args.low)
else:
    print("note:          no LoRA is given; what is not distilled to four steps makes poorer videos in them")
start = time.perf_counter()
video = pipe(args.prompt, seed=args.seed, distilled="lightning-4")
seconds = time.perf_counter() - start

(clip,) = video.save(args.output, overwrite=True)
sheet = args.output.with_suffix(".png")
video.contact_sheet().save(sheet)
print(f"prompt:        {args.prompt}")
print(f"recipe:        {video.recipe}")
print(f"video:         {clip}")
print(f"contact sheet: {sheet}")
print(f"time:          {seconds:.1f} s for {video.recipe.num_inference_steps} steps, without loading")
