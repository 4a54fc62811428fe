"""The miniature pipelines from prompt to frames beside diffusers' own: the same folder, settings and seed.

    python -m tests.bench.pipelines

Each side samples with the solver it loads from the folder. Their noise levels differ a little (diffusers'
schedule is not the official one), and so do the frames. Ours is accelerated (`pipe.accelerate()`), where no
row says "as loaded".
"""

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

from tests.bench.harness import Row, Settings, compare, main
from wan22 import WanI2VPipeline, WanT2VPipeline, tiny_checkpoint

PROMPT = "a red circle moves to the right on a blue background"
NEGATIVE = "fog"
STEPS = 20
TARGET = 1.0
# Name, checkpoint, whether it is given an image, width and height, guidance.
CASES = (
    ("T2V", "t2v", False, 64, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
    ("I2V", "i2v", True, 64, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
    ("TI2V, text mode", "ti2v", False, 128, {"guidance_scale": 4.0}),
    ("TI2V, image mode", "ti2v", True, 128, {"guidance_scale": 4.0}),
)
SHARED = ("tokenizer", "text_encoder", "vae")


def our_pipeline(checkpoint: str, with_image: bool) -> Any:
    """Load a miniature checkpoint."""
    cls = WanI2VPipeline if with_image else WanT2VPipeline
    return cls.from_pretrained(tiny_checkpoint(checkpoint), dtype=torch.float32)


def their_pipeline(checkpoint: str, with_image: bool) -> Any:
    """Load the same with diffusers, which does not know that folders share components."""
    cls = diffusers.WanImageToVideoPipeline if with_image else diffusers.WanPipeline
    folder, parts = tiny_checkpoint(checkpoint), {}
    lacking = [name for name in SHARED if not (folder / name).exists()]
    if lacking:
        whole = diffusers.WanPipeline.from_pretrained(tiny_checkpoint("t2v"), torch_dtype=torch.float32)
        parts = {name: whole.components[name] for name in lacking}
    return cls.from_pretrained(folder, torch_dtype=torch.float32, **parts)


def calls(
    ours: Any, theirs: Any, with_image: bool, **settings: Any
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Return a call of our pipeline and the same of theirs; each gives frames, "b t h w c"."""
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "np", **settings}
    if with_image:
        arguments["image"] = picture(settings["width"])

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    return (
        lambda: ours(**arguments, generator=seed()).frames,
        lambda: theirs(**arguments, generator=seed()).frames,
    )


def picture(side: int) -> Image.Image:
    """Draw a red circle on blue."""
    image = Image.new("RGB", (side, side), (30, 60, 220))
    ImageDraw.Draw(image).ellipse([side // 4, side // 4, side // 2, side // 2], fill=(220, 40, 40))
    return image


def run(settings: Settings) -> list[Row]:
    """Compare whole calls."""
    rows = []
    for name, checkpoint, with_image, side, guidance in CASES:
        pair = our_pipeline(checkpoint, with_image), their_pipeline(checkpoint, with_image)
        steps = 4 if settings.quick else STEPS
        sizes = {"width": side, "height": side, "num_frames": 17, "num_inference_steps": steps}
        ours, theirs = calls(*pair, with_image, **sizes, **guidance)
        difference = float(np.abs(ours() - theirs()).mean())
        facts = {"dtype": "fp32", "shape": f"{side}x{side}x17, {steps} steps"}
        facts["note"] = f"mean difference {difference:.3f} of 1"
        if not settings.quick:
            rows.append(compare(f"miniature {name}, as loaded", ours, theirs, settings, **facts))
        pair[0].accelerate()
        rows.append(compare(f"miniature {name}", ours, theirs, settings, TARGET, **facts))
    return rows


if __name__ == "__main__":
    main(run, __doc__)
