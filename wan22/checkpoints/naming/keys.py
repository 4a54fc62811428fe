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


# ---- transformer ----


def _transformer_rules() -> Iterator[Rule]:
    embedder, image = "condition_embedder", "condition_embedder.image_embedder"
    yield from _each(
        _LINEAR,
        ("patch_embedding", "patch_embedding"),
        ("text_embedding.0", f"{embedder}.text_embedder.linear_1"),
        ("text_embedding.2", f"{embedder}.text_embedder.linear_2"),
        ("time_embedding.0", f"{embedder}.time_embedder.linear_1"),
        ("time_embedding.2", f"{embedder}.time_embedder.linear_2"),
        ("time_projection.1", f"{embedder}.time_proj"),
        ("img_emb.proj.0", f"{image}.norm1"),
        ("img_emb.proj.1", f"{image}.ff.net.0.proj"),
        ("img_emb.proj.3", f"{image}.ff.net.2"),
        ("img_emb.proj.4", f"{image}.norm2"),
        ("head.head", "proj_out"),
        ("blocks.{}.norm3", "blocks.{}.norm2"),
        ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
        ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
        ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
        ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
    )
    yield "img_emb.emb_pos", f"{image}.pos_embed"
    yield "head.modulation", "scale_shift_table"
    yield "blocks.{}.modulation", "blocks.{}.scale_shift_table"
    yield "blocks.{}.cross_attn.norm_k_img.weight", "blocks.{}.attn2.norm_added_k.weight"
    for source, target in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        names = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
        pairs = [(f"blocks.{{}}.{source}.{s}", f"blocks.{{}}.{target}.{t}") for s, t in names]
        yield from _each(_LINEAR, *pairs)
        for norm in ("norm_q", "norm_k"):
            yield f"blocks.{{}}.{source}.{norm}.weight", f"blocks.{{}}.{target}.{norm}.weight"


TRANSFORMER = KeyTable(_transformer_rules())


# ---- autoencoder ----


def _residual_block(source: str, target: str) -> Iterator[Rule]:
    yield from _each(("gamma",), (f"{source}.residual.0", f"{target}.norm1"))
    yield from _each(("gamma",), (f"{source}.residual.3", f"{target}.norm2"))
    convolutions = (("residual.2", "conv1"), ("residual.6", "conv2"), ("shortcut", "conv_shortcut"))
    yield from _each(_LINEAR, *((f"{source}.{s}", f"{target}.{t}") for s, t in convolutions))


def _resampler(source: str, target: str) -> Iterator[Rule]:
    yield from _each(
        _LINEAR, *((f"{source}.{name}", f"{target}.{name}") for name in ("resample.1", "time_conv"))
    )


def _autoencoder_rules(residual: bool, res_blocks: int, levels: int) -> Iterator[Rule]:
    yield from _each(_LINEAR, ("conv1", "quant_conv"), ("conv2", "post_quant_conv"))
    for part in ("encoder", "decoder"):
        yield from _each(
            _LINEAR, (f"{part}.conv1", f"{part}.conv_in"), (f"{part}.head.2", f"{part}.conv_out")
        )
        yield f"{part}.head.0.gamma", f"{part}.norm_out.gamma"
        middle, attention = f"{part}.mid_block.resnets", f"{part}.mid_block.attentions.0"
        yield from _residual_block(f"{part}.middle.0", f"{middle}.0")
        yield from _residual_block(f"{part}.middle.2", f"{middle}.1")
        yield f"{part}.middle.1.norm.gamma", f"{attention}.norm.gamma"
        pairs = [(f"{part}.middle.1.{name}", f"{attention}.{name}") for name in ("to_qkv", "proj")]
        yield from _each(_LINEAR, *pairs)
    if residual:  # 2.2: the blocks of a resolution are in one group
        down, up = "encoder.downsamples.{}.downsamples", "decoder.upsamples.{}.upsamples"
        for i in range(res_blocks):
            yield from _residual_block(f"{down}.{i}", f"encoder.down_blocks.{{}}.resnets.{i}")
        for i in range(res_blocks + 1):
            yield from _residual_block(f"{up}.{i}", f"decoder.up_blocks.{{}}.resnets.{i}")
        yield from _resampler(f"{down}.{res_blocks}", "encoder.down_blocks.{}.downsampler")
        yield from _resampler(f"{up}.{res_blocks + 1}", "decoder.up_blocks.{}.upsampler")
        return
    yield from _residual_block("encoder.downsamples.{}", "encoder.down_blocks.{}")
    yield from _resampler("encoder.downsamples.{}", "encoder.down_blocks.{}")
    for level in range(levels):  # 2.1: all blocks of the decoder are in one list, here grouped by resolution
        first = level * (res_blocks + 2)
        for i in range(res_blocks + 1):
            yield from _residual_block(
                f"decoder.upsamples.{first + i}", f"decoder.up_blocks.{level}.resnets.{i}"
            )
        yield from _resampler(
            f"decoder.upsamples.{first + res_blocks + 1}", f"decoder.up_blocks.{level}.upsamplers.0"
        )


def autoencoder_keys(residual: bool, res_blocks: int = 2, levels: int = 4) -> KeyTable:
    """Return the table of an autoencoder with a layout as `AutoencoderLayout` describes it."""
    return KeyTable(_autoencoder_rules(residual, res_blocks, levels))


# ---- text encoder ----

_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"
_DENSE = "encoder.block.{}.layer.1.DenseReluDense"
_TEXT_ENCODER = {  # in transformers: in official files, in GGUF
    "shared": ("token_embedding", "token_embd"),
    "encoder.final_layer_norm": ("norm", "enc.output_norm"),
    "encoder.block.{}.layer.0.layer_norm": ("blocks.{}.norm1", "enc.blk.{}.attn_norm"),
    "encoder.block.{}.layer.1.layer_norm": ("blocks.{}.norm2", "enc.blk.{}.ffn_norm"),
    f"{_ATTENTION}.q": ("blocks.{}.attn.q", "enc.blk.{}.attn_q"),
    f"{_ATTENTION}.k": ("blocks.{}.attn.k", "enc.blk.{}.attn_k"),
    f"{_ATTENTION}.v": ("blocks.{}.attn.v", "enc.blk.{}.attn_v"),
    f"{_ATTENTION}.o": ("blocks.{}.attn.o", "enc.blk.{}.attn_o"),
    # One table of relative positions per layer.
    f"{_ATTENTION}.relative_attention_bias": ("blocks.{}.pos_embedding.embedding", "enc.blk.{}.attn_rel_b"),
    f"{_DENSE}.wi_0": ("blocks.{}.ffn.gate.0", "enc.blk.{}.ffn_gate"),
    f"{_DENSE}.wi_1": ("blocks.{}.ffn.fc1", "enc.blk.{}.ffn_up"),
    f"{_DENSE}.wo": ("blocks.{}.ffn.fc2", "enc.blk.{}.ffn_down"),
}
TEXT_ENCODER, TEXT_ENCODER_GGUF = (
    KeyTable(_each(("weight",), *((names[kind], ours) for ours, names in _TEXT_ENCODER.items())))
    for kind in range(2)
)


# ---- image encoder (Wan 2.1) ----

# Of the official CLIP; queries, keys and values, one tensor there, are three here, "q", "k" and "v".
IMAGE_ENCODER = KeyTable(
    [
        ("visual.cls_embedding", "embeddings.class_embedding"),
        ("visual.pos_embedding", "embeddings.position_embedding.weight"),
        ("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"),
        *_each(
            _LINEAR,
            ("visual.pre_norm", "pre_layrnorm"),
            ("visual.post_norm", "post_layernorm"),
            *(
                (f"visual.transformer.{{}}.{source}", f"encoder.layers.{{}}.{target}")
                for source, target in (
                    ("norm1", "layer_norm1"),
                    ("norm2", "layer_norm2"),
                    ("attn.q", "self_attn.q_proj"),
                    ("attn.k", "self_attn.k_proj"),
                    ("attn.v", "self_attn.v_proj"),
                    ("attn.proj", "self_attn.out_proj"),
                    ("mlp.0", "mlp.fc1"),
                    ("mlp.2", "mlp.fc2"),
                )
            ),
        ),
    ]
)
