"""A LoRA for each of the two experts, at several strengths. By default one that makes all purple."""

import argparse
import time
from pathlib import Path

import torch

from wan22 import WanT2VPipeline, tiny_checkpoint

PURPLE = Path(__file__).parents[1] / "tests/loras"  # trained for the miniature checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a red circle moves to the right on a blue background")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--high", default=PURPLE / "purple_high.safetensors", help="high-noise expert's file")
parser.add_argument("--low", default=PURPLE / "purple_low.safetensors", help="low-noise expert's file")
parser.add_argument("--seed", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/lora.mp4"))
args = parser.parse_args()

# bf16 is quick on a GPU, float32 on most CPUs.
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
start = time.perf_counter()
pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)
pipe.load_lora_weights(high=args.high, low=args.low, adapter_name="lora")

print(f"prompt:        {args.prompt}")
# One number is for both experts, (high, low) is for one each.
strengths: dict[str, float | tuple[float, float]]
strengths = {"off": 0.0, "half": 0.5, "full": 1.0, "high": (1.0, 0.0)}
for name, strength in strengths.items():
    pipe.set_adapters("lora", strength)
    video = pipe(args.prompt, seed=args.seed)
    (clip,) = video.save(args.output.with_stem(f"{args.output.stem}-{name}"), overwrite=True)
    sheet = clip.with_suffix(".png")
    video.contact_sheet().save(sheet)
    print(f"strength:      {strength}")
    print(f"video:         {clip}")
    print(f"contact sheet: {sheet}")

pipe.unload_lora_weights()  # the weights are as they were, to the bit
print(f"time:          {time.perf_counter() - start:.1f} s, loading included")
