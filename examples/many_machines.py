"""Many prompts on all GPUs of a Ray cluster, one pipeline on each; a second start makes what is missing.

On one machine, or those joined by `ray start` that share the folder: pip install "wan22-pipelines[ray]".
"""

import argparse
from pathlib import Path

import ray
import torch

from wan22 import WanT2VPipeline, tiny_checkpoint

PROMPTS = ["a red circle moves to the right on a blue background", "a yellow square moves up"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="*", default=PROMPTS, help="texts, or one file with a prompt per line")
parser.add_argument("--checkpoint", default=tiny_checkpoint("t2v"), help="folder or hub repository")
parser.add_argument("--workers", type=int, help="default: as many as there are GPUs, or two without")
parser.add_argument("--output", type=Path, default=Path("outputs/many_machines"), help="folder")
args = parser.parse_args()
if len(args.prompts) == 1 and Path(args.prompts[0]).is_file():
    args.prompts = Path(args.prompts[0]).read_text().splitlines()


class Maker:
    """A Ray actor that loads its pipeline once, on its own GPU."""

    def __init__(self) -> None:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.pipe = WanT2VPipeline.from_pretrained(args.checkpoint, dtype=dtype).to(device)

    def __call__(self, item: dict[str, str]) -> dict[str, str]:
        """Make a video; its file appears only when it is complete."""
        self.pipe(item["prompt"], seed=0).save(item["file"])
        return item | {"maker": ray.get_runtime_context().get_actor_id() or ""}


ray.init(log_to_driver=False)
gpus = int(ray.cluster_resources().get("GPU", 0))
files = [args.output.absolute() / f"{number:03}.mp4" for number in range(1, len(args.prompts) + 1)]
todo = [{"prompt": p, "file": str(f)} for p, f in zip(args.prompts, files, strict=True) if not f.exists()]
print(f"{len(files)} prompts, {len(files) - len(todo)} of them done already")
if todo:
    ray.data.DataContext.get_current().wait_for_min_actors_s = 3600  # so that each gets its share
    makers = ray.data.ActorPoolStrategy(size=args.workers or gpus or 2, max_tasks_in_flight_per_actor=1)
    items = ray.data.from_items(todo, override_num_blocks=len(todo))
    made = items.map(Maker, compute=makers, num_cpus=1, num_gpus=min(gpus, 1))  # type: ignore[arg-type]
    for item in made.iter_rows():
        print(f"{item['file']} by {item['maker'][:8]}: {item['prompt']}")
