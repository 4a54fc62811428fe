"""What makes a pipeline faster or smaller, by name; for tests of several of them at once."""

import copy
from dataclasses import replace

import torch

from tests.accel.offload.recording import RecordingDevice
from tests.builders import SMALL, random_i2v_pipeline, random_pipeline, random_ti2v_pipeline
from wan22 import accel
from wan22.accel.offload.layout import Placement

MODELS = ("text_encoder", "transformer", "transformer_2", "vae")
FORMS = {"t2v": random_pipeline, "i2v": random_i2v_pipeline, "ti2v": random_ti2v_pipeline}


def streamed(pipe):
    """Let the transformers' blocks stream, and the rest come and go."""
    plan = accel.plan(pipe, height=32, width=32, num_frames=5, vram="2GB", ram="8GB")
    placements = dict.fromkeys(plan.placements, Placement("on_demand"))
    for slot in ("transformer", "transformer_2"):
        if slot in placements:
            placements[slot] = Placement("streamed", resident_blocks=1, source="pinned")
    pipe.apply(replace(plan, placements=placements), RecordingDevice())


# What changes the result, with a LoRA's file.
CHANGING = {
    "int8": lambda pipe, lora: pipe.quantize("int8"),
    "lora": lambda pipe, lora: pipe.load_lora_weights(lora),
}
# What does not, and what takes it away.
SAME = {
    "accelerate": (lambda pipe: pipe.accelerate(), lambda pipe: pipe.decelerate()),
    "attention": (lambda pipe: pipe.set_attention_backend("math"), lambda pipe: pipe.set_attention_backend()),
    "compile": (lambda pipe: pipe.compile(vae=True, backend="eager"), lambda pipe: pipe.uncompile()),
    "streamed": (streamed, lambda pipe: pipe.release()),
    "strips": (lambda pipe: pipe.vae.enable_strips(2), lambda pipe: pipe.vae.disable_strips()),
}


def own(form):
    pipe = FORMS[form]()
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in MODELS if getattr(pipe, name) is not None}
    for slot in ("transformer", "transformer_2"):
        if slot in parts:  # enough blocks that some stream
            parts[slot].blocks.extend(copy.deepcopy(parts[slot].blocks[0]) for _ in range(3))
    return FORMS[form](**parts)


def frames(pipe, form):
    arguments = {**SMALL, "height": 32, "width": 32, "num_frames": 9, "seed": 1, "output_type": "pt"}
    if pipe.config.boundary_ratio is None:
        arguments.pop("guidance_scale_2", None)
    if form != "t2v":
        arguments["image"] = torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)
    return pipe(prompt="a", **arguments).frames
