"""What tests of LoRAs in one transformer share: calls, LoRAs, and weights merged by a formula of its own."""

import copy

import torch

from tests.checkpoints.lora_writers import DIALECTS, in_diffusers
from wan22.checkpoints.files.weights import WeightFile
from wan22.checkpoints.lora.adapters import adapters_of
from wan22.checkpoints.lora.dialects import read_lora

DELTAS = {
    "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "patch_embedding.diff": "patch_embedding.weight",
}
FILE = "pytorch_lora_weights.safetensors"


def run(model, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, 3, model.config.text_dim, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, return_dict=False, **options)[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def lora_of(model, table, deltas=()):
    tensors = DIALECTS["diffusion_model, alpha"](table) | dict(deltas)
    return read_lora(WeightFile("table", tensors), adapters_of(model).shapes)["transformer"]


def load(model, table, name="a", strength=1.0, deltas=()):
    adapters_of(model).load(name, lora_of(model, table, deltas), strength)


def swap(model, table, name="a", strength=1.0):
    adapters_of(model).swap(name, lora_of(model, table), strength)


def merged(model, table, strength=1.0, deltas=(), scale_of=lambda module: 1.0):
    """The model with a LoRA added to its weights, by a formula of its own."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module, (down, up, alpha) in table.items():
            name = in_diffusers(module)
            factor = strength * scale_of(name) * alpha / down.shape[0]
            model.get_submodule(name).weight += factor * (up @ down)
        for name, delta in dict(deltas).items():
            model.get_parameter(name).add_(strength * delta)
    return model


def differences(model):
    """Whole differences: as the file has them, and by our parameters."""
    generator = torch.Generator().manual_seed(5)
    by_ours = {
        n: torch.randn(model.get_parameter(n).shape, generator=generator) * 0.1 for n in DELTAS.values()
    }
    return {f"diffusion_model.{key}": by_ours[ours] for key, ours in DELTAS.items()}, by_ours


def model_without(model):
    model = copy.deepcopy(model)
    model.unload_lora()
    return model
