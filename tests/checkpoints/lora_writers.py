"""LoRA files in every dialect, written as their trainers write them, not by the library.

A LoRA is a table from official module names to (down, up, alpha); a dialect turns it into a file's keys.
"""

import torch

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
