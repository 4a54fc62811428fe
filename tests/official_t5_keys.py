"""Rename the official umT5 encoder's parameters, as the golden file holds them, to transformers' names."""

import re

import torch

_RULES = [
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]


def t5_state_dict(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the official weights under transformers' names, the embedding under both of its names."""
    renamed = {}
    for key, value in official.items():
        for pattern, replacement in _RULES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return {**renamed, "encoder.embed_tokens.weight": renamed["shared.weight"]}


def t5_config(official: dict) -> dict:
    """Return UMT5Config's arguments for an official configuration."""
    return {
        "vocab_size": official["vocab"],
        "d_model": official["dim"],
        "d_kv": official["dim_attn"] // official["num_heads"],
        "d_ff": official["dim_ffn"],
        "num_heads": official["num_heads"],
        "num_layers": official["num_layers"],
        "relative_attention_num_buckets": official["num_buckets"],
        "feed_forward_proj": "gated-gelu",
    }
