"""One table of whole-key patterns per model: the names of its parameters in official files, and in ours.

Ours are those of diffusers and transformers. "{}" in a pattern stands for a number; every key matches exactly
one rule or none. Loader, converter and LoRA use the same tables, in either direction.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

Rule = tuple[str, str]
_LINEAR = ("weight", "bias")
_NUMBER = re.compile(r"\{\}|\d+")


class KeyTable:
    """Rules from one naming to another: pairs of patterns, with as many "{}" on both sides."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        # By the source without its numbers, so that a key is compared with one or two rules, not all.
        self._rules_of: dict[str, list[tuple[re.Pattern[str], str]]] = {}
        for source, target in self.rules:
            self._rules_of.setdefault(_outline(source), []).append((_regex(source), target))

    @cached_property
    def inverse(self) -> "KeyTable":
        """The table for the way back."""
        return KeyTable((target, source) for source, target in self.rules)

    def rename(self, key: str) -> str | None:
        """Return a key's other name; None if no rule knows it."""
        for pattern, target in self._rules_of.get(_outline(key), ()):
            if match := pattern.fullmatch(key):
                return target.format(*match.groups())
        return None

    def count(self, keys: Iterable[str]) -> int:
        """Return how many of these keys a rule knows."""
        return sum(self.rename(key) is not None for key in keys)


def _outline(pattern: str) -> str:
    """Return a key or pattern with "#" for each number."""
    return _NUMBER.sub("#", pattern)


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))


def _each(parameters: Iterable[str], *modules: Rule) -> Iterator[Rule]:
    """Yield a rule for each parameter of each pair of modules."""
    for source, target in modules:
        for name in parameters:
            yield f"{source}.{name}", f"{target}.{name}"


def _within(source: str, target: str, rules: Iterable[Rule]) -> Iterator[Rule]:
    """Yield rules for what is inside a pair of modules."""
    for inner, outer in rules:
        yield f"{source}.{inner}", f"{target}.{outer}"


# ---- transformer ----

_ATTENTION = (
    *_each(_LINEAR, ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
    *_each(("weight",), ("norm_q", "norm_q"), ("norm_k", "norm_k")),
)
_IMAGE_ATTENTION = (
    *_each(_LINEAR, ("k_img", "add_k_proj"), ("v_img", "add_v_proj")),
    ("norm_k_img.weight", "norm_added_k.weight"),
)
_BLOCK = (
    ("modulation", "scale_shift_table"),
    *_each(_LINEAR, ("norm3", "norm2"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2")),
    *_within("self_attn", "attn1", _ATTENTION),
    *_within("cross_attn", "attn2", _ATTENTION + _IMAGE_ATTENTION),
)
_IMAGE_EMBEDDER = (
    ("emb_pos", "pos_embed"),
    *_each(
        _LINEAR,
        ("proj.0", "norm1"),
        ("proj.1", "ff.net.0.proj"),
        ("proj.3", "ff.net.2"),
        ("proj.4", "norm2"),
    ),
)
TRANSFORMER = KeyTable(
    [
        *_each(
            _LINEAR,
            ("patch_embedding", "patch_embedding"),
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
            ("head.head", "proj_out"),
        ),
        *_within("img_emb", "condition_embedder.image_embedder", _IMAGE_EMBEDDER),
        *_within("blocks.{}", "blocks.{}", _BLOCK),
        ("head.modulation", "scale_shift_table"),
    ]
)


# ---- autoencoder ----

_RESIDUAL_BLOCK = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.3.gamma", "norm2.gamma"),
    *_each(_LINEAR, ("residual.2", "conv1"), ("residual.6", "conv2"), ("shortcut", "conv_shortcut")),
)
_RESAMPLER = (*_each(_LINEAR, ("resample.1", "resample.1"), ("time_conv", "time_conv")),)
_MIDDLE_AND_ENDS = (
    *_each(_LINEAR, ("conv1", "conv_in"), ("head.2", "conv_out")),
    ("head.0.gamma", "norm_out.gamma"),
    *_within("middle.0", "mid_block.resnets.0", _RESIDUAL_BLOCK),
    *_within("middle.2", "mid_block.resnets.1", _RESIDUAL_BLOCK),
    ("middle.1.norm.gamma", "mid_block.attentions.0.norm.gamma"),
    *_within("middle.1", "mid_block.attentions.0", _each(_LINEAR, ("to_qkv", "to_qkv"), ("proj", "proj"))),
)


def autoencoder_keys(residual: bool, res_blocks: int = 2, levels: int = 4) -> KeyTable:
    """Return the table of an autoencoder with a layout as `AutoencoderLayout` describes it."""
    return KeyTable(_autoencoder_rules(residual, res_blocks, levels))


def _autoencoder_rules(residual: bool, res_blocks: int, levels: int) -> Iterator[Rule]:
    yield from _each(_LINEAR, ("conv1", "quant_conv"), ("conv2", "post_quant_conv"))
    for part in ("encoder", "decoder"):
        yield from _within(part, part, _MIDDLE_AND_ENDS)
    down, up = "encoder.downsamples", "decoder.upsamples"
    if residual:  # 2.2: the blocks of a resolution are in one group
        down, up = f"{down}.{{}}.downsamples", f"{up}.{{}}.upsamples"
        for i in range(res_blocks):
            yield from _within(f"{down}.{i}", f"encoder.down_blocks.{{}}.resnets.{i}", _RESIDUAL_BLOCK)
        for i in range(res_blocks + 1):
            yield from _within(f"{up}.{i}", f"decoder.up_blocks.{{}}.resnets.{i}", _RESIDUAL_BLOCK)
        yield from _within(f"{down}.{res_blocks}", "encoder.down_blocks.{}.downsampler", _RESAMPLER)
        yield from _within(f"{up}.{res_blocks + 1}", "decoder.up_blocks.{}.upsampler", _RESAMPLER)
        return
    yield from _within(f"{down}.{{}}", "encoder.down_blocks.{}", _RESIDUAL_BLOCK + _RESAMPLER)
    for level in range(levels):  # 2.1: all blocks of the decoder are in one list, here grouped by resolution
        first, target = level * (res_blocks + 2), f"decoder.up_blocks.{level}"
        for i in range(res_blocks + 1):
            yield from _within(f"{up}.{first + i}", f"{target}.resnets.{i}", _RESIDUAL_BLOCK)
        yield from _within(f"{up}.{first + res_blocks + 1}", f"{target}.upsamplers.0", _RESAMPLER)


# ---- text encoder ----

_SELF_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"
_DENSE = "encoder.block.{}.layer.1.DenseReluDense"
_TEXT_ENCODER = {  # in transformers: in official files, in GGUF
    "shared": ("token_embedding", "token_embd"),
    "encoder.final_layer_norm": ("norm", "enc.output_norm"),
    "encoder.block.{}.layer.0.layer_norm": ("blocks.{}.norm1", "enc.blk.{}.attn_norm"),
    "encoder.block.{}.layer.1.layer_norm": ("blocks.{}.norm2", "enc.blk.{}.ffn_norm"),
    f"{_SELF_ATTENTION}.q": ("blocks.{}.attn.q", "enc.blk.{}.attn_q"),
    f"{_SELF_ATTENTION}.k": ("blocks.{}.attn.k", "enc.blk.{}.attn_k"),
    f"{_SELF_ATTENTION}.v": ("blocks.{}.attn.v", "enc.blk.{}.attn_v"),
    f"{_SELF_ATTENTION}.o": ("blocks.{}.attn.o", "enc.blk.{}.attn_o"),
    # One table of relative positions per layer.
    f"{_SELF_ATTENTION}.relative_attention_bias": (
        "blocks.{}.pos_embedding.embedding",
        "enc.blk.{}.attn_rel_b",
    ),
    f"{_DENSE}.wi_0": ("blocks.{}.ffn.gate.0", "enc.blk.{}.ffn_gate"),
    f"{_DENSE}.wi_1": ("blocks.{}.ffn.fc1", "enc.blk.{}.ffn_up"),
    f"{_DENSE}.wo": ("blocks.{}.ffn.fc2", "enc.blk.{}.ffn_down"),
}
TEXT_ENCODER, TEXT_ENCODER_GGUF = (
    KeyTable(_each(("weight",), *((names[kind], ours) for ours, names in _TEXT_ENCODER.items())))
    for kind in range(2)
)


# ---- image encoder (Wan 2.1) ----

# Queries, keys and values, one tensor in the official file, are three here, "q", "k" and "v".
_IMAGE_LAYER = _each(
    _LINEAR,
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.q", "self_attn.q_proj"),
    ("attn.k", "self_attn.k_proj"),
    ("attn.v", "self_attn.v_proj"),
    ("attn.proj", "self_attn.out_proj"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
)
IMAGE_ENCODER = KeyTable(
    [
        ("visual.cls_embedding", "embeddings.class_embedding"),
        ("visual.pos_embedding", "embeddings.position_embedding.weight"),
        ("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"),
        *_each(_LINEAR, ("visual.pre_norm", "pre_layrnorm"), ("visual.post_norm", "post_layernorm")),
        *_within("visual.transformer.{}", "encoder.layers.{}", _IMAGE_LAYER),
    ]
)
