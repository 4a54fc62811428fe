"""What tests of LoRAs in pipelines share: weights merged by a formula of its own."""

import copy

import torch

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import in_diffusers

SLOTS = ("transformer", "transformer_2")
LORA = "pretrained_model_name_or_path_or_dict"


def merge(model, table, strength=1.0, deltas=()):
    """Add a LoRA to a model's weights."""
    with torch.no_grad():
        for module, (down, up, alpha) in table.items():
            layer = model.get_submodule(in_diffusers(module))
            layer.weight += strength * alpha / down.shape[0] * (up @ down)
        for name, delta in dict(deltas).items():
            model.get_parameter(name).add_(strength * delta)


def merged(strengths, tables, deltas=()):
    """The latents of merged weights."""
    pipe = copy.deepcopy(random_pipeline())
    for slot, strength in zip(SLOTS, strengths, strict=True):
        merge(getattr(pipe, slot), tables[slot], strength, deltas)
    return latents_of(pipe)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
