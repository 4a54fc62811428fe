"""LoRA files in every dialect, written as their trainers write them, not by the library.

A LoRA is a table from official module names to (down, up, alpha); a dialect turns it into a file's keys.
"""

import torch
from safetensors.torch import save_file

from wan22.checkpoints.naming.keys import TRANSFORMER

Table = dict[str, tuple[torch.Tensor, torch.Tensor, float]]

# Names of diffusers' modules, in the order in which they are replaced.
DIFFUSERS = (
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q", ".to_q"),
    (".k", ".to_k"),
    (".v", ".to_v"),
    (".o", ".to_out.0"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)


def in_diffusers(module: str) -> str:
    for official, theirs in DIFFUSERS:
        if official.startswith("."):
            if module.endswith(official):
                module = module.removesuffix(official) + theirs
        else:
            module = module.replace(official, theirs)
    return module


def _pairs(lora: Table, name, down: str, up: str, alpha: bool) -> dict[str, torch.Tensor]:
    file = {}
    for module, (a, b, strength) in lora.items():
        # Without alpha it is the rank, so the strength goes into a matrix.
        file[f"{name(module)}.{down}"] = a.clone()
        file[f"{name(module)}.{up}"] = b.clone() if alpha else b * (strength / a.shape[0])
        if alpha:
            file[f"{name(module)}.alpha"] = torch.tensor(strength)
    return file


def _flat(prefix: str):
    return lambda module: prefix + module.replace(".", "_")


DIALECTS = {
    "diffusion_model, alpha": lambda w: _pairs(
        w, "diffusion_model.{}".format, "lora_down.weight", "lora_up.weight", True
    ),
    "diffusion_model, A and B": lambda w: _pairs(
        w, "diffusion_model.{}".format, "lora_A.weight", "lora_B.weight", False
    ),
    "default adapter": lambda w: _pairs(
        w, "diffusion_model.{}".format, "lora_A.default.weight", "lora_B.default.weight", False
    ),
    "no prefix": lambda w: _pairs(w, "{}".format, "lora_down.weight", "lora_up.weight", True),
    "musubi": lambda w: _pairs(w, _flat("lora_unet_"), "lora_down.weight", "lora_up.weight", True),
    "fun": lambda w: _pairs(w, _flat("lora_unet__"), "lora_down.weight", "lora_up.weight", True),
    "lycoris": lambda w: _pairs(w, _flat("lycoris_"), "lora_down.weight", "lora_up.weight", True),
    "diffusers": lambda w: _pairs(
        w, lambda m: f"transformer.{in_diffusers(m)}", "lora_A.weight", "lora_B.weight", False
    ),
    "diffusers, old": lambda w: _pairs(
        w, lambda m: f"transformer.{in_diffusers(m)}", "lora.down.weight", "lora.up.weight", False
    ),
    "peft": lambda w: _pairs(w, "base_model.model.{}".format, "lora_A.weight", "lora_B.weight", False),
    "full differences": lambda w: {
        f"diffusion_model.{module}.diff": b @ a * (alpha / a.shape[0]) for module, (a, b, alpha) in w.items()
    },
}


def linears(model):
    """Official names and shapes of the blocks' linear layers."""
    names = {TRANSFORMER.inverse.rename(name): w.shape for name, w in model.state_dict().items()}
    return {
        name.removesuffix(".weight"): shape
        for name, shape in names.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    }


def make_lora(model, seed, share=1.0):
    """A LoRA with another rank and alpha in each module, for the first modules of a model."""
    generator = torch.Generator().manual_seed(seed)
    table, layers = {}, linears(model)
    for i, (module, (o, n)) in enumerate(layers.items()):
        if i < share * len(layers):
            rank = 2 + i % 3
            down, up = (torch.randn(s, generator=generator) * 0.15 for s in ((rank, n), (o, rank)))
            table[module] = (down, up, float(1 + i % 4))
    return table


def save(table, path, dialect="diffusion_model, alpha"):
    save_file({k: v.contiguous() for k, v in DIALECTS[dialect](table).items()}, path)
    return path


def save_one_layer(pipe, path, seed=0):
    """Write a LoRA of one layer."""
    torch.manual_seed(seed)
    name = "blocks.0.attn1.to_q"
    o, i = pipe.transformer.get_submodule(name).weight.shape
    official = str(TRANSFORMER.inverse.rename(f"{name}.weight")).removesuffix(".weight")
    down, up = torch.randn(2, i), torch.randn(o, 2)
    save_file(
        {
            f"diffusion_model.{official}.lora_A.weight": down,
            f"diffusion_model.{official}.lora_B.weight": up,
        },
        path,
    )
    return path
