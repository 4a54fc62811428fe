"""Rename the official transformer's parameters, as the golden files hold them, to the library's names."""

import re

import torch

_RULES = [
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.head", "proj_out"),
    (r"^head\.modulation", "scale_shift_table"),
    (r"^(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3", r"\1.norm2"),
    (r"^(blocks\.\d+)\.ffn\.0", r"\1.ffn.net.0.proj"),
    (r"^(blocks\.\d+)\.ffn\.2", r"\1.ffn.net.2"),
    (r"^(blocks\.\d+)\.(self|cross)_attn\.([qkv])\.", r"\1.\2.to_\3."),
    (r"^(blocks\.\d+)\.(self|cross)_attn\.o\.", r"\1.\2.to_out.0."),
    (r"^(blocks\.\d+)\.(self|cross)_attn\.norm", r"\1.\2.norm"),
    (r"^(blocks\.\d+)\.self\.", r"\1.attn1."),
    (r"^(blocks\.\d+)\.cross\.", r"\1.attn2."),
]


def transformer_state_dict(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the official weights under our names, in float32."""
    renamed = {}
    for key, value in official.items():
        for pattern, replacement in _RULES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value.float()
    return renamed


def transformer_config(official: dict) -> dict:
    """Return our constructor arguments for an official configuration."""
    return {
        "patch_size": tuple(official["patch_size"]),
        "num_attention_heads": official["num_heads"],
        "attention_head_dim": official["dim"] // official["num_heads"],
        "in_channels": official["in_dim"],
        "out_channels": official["out_dim"],
        "text_dim": official["text_dim"],
        "freq_dim": official["freq_dim"],
        "ffn_dim": official["ffn_dim"],
        "num_layers": official["num_layers"],
        "eps": official["eps"],
    }
