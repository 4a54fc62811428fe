"""Measure the ratios that cache="mag" goes by for an embedded checkpoint, and write them beside it.

    python examples/tiny/calibrate_cache.py --task t2v

Four prompts at the checkpoint's own settings; for image to video, with the first frames of drawn clips.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from clips import all_scenes, canonical, draw

import wan22

FILE = "cache_ratios.json"


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("t2v", "i2v", "ti2v"), required=True)
    parser.add_argument("--out", type=Path, help="folder for the file; default is the checkpoint's")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = wan22.tiny_checkpoint(arguments.task)
    scenes = list(all_scenes())
    scenes = scenes[:: len(scenes) // arguments.prompts][: arguments.prompts]
    rng = np.random.default_rng(0)
    images = {"image": [draw(scene, rng)[0] for scene in scenes]} if arguments.task == "i2v" else {}
    pipeline = wan22.WanI2VPipeline if images else wan22.WanT2VPipeline
    ratios = pipeline.from_pretrained(folder).calibrate_cache(list(map(canonical, scenes)), seed=0, **images)
    print(ratios.save((arguments.out or folder) / FILE))


if __name__ == "__main__":
    main()
