"""A model's configuration, inferred from the names and shapes of its tensors.

The functions raise ValueError where the tensors are another model's; `source` is the file, for that error.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Shapes = Mapping[str, tuple[int, ...]]

_KNOWN = "Wan model that is known here"  # in errors
HEAD_DIM = 128  # of every released Wan transformer
PATCH_SIZE = (1, 2, 2)  # of every released Wan transformer
CLIP_HEAD_DIM = 80  # of the released image encoder, ViT-H
# Parts of the family's other models, by the start of their names.
OTHER_TRANSFORMERS = {
    "vace_blocks.": "VACE",
    "vace_patch_embedding.": "VACE",
    "pose_patch_embedding.": "Wan2.2-Animate",
    "face_encoder.": "Wan2.2-Animate",
    "motion_encoder.": "Wan2.2-Animate",
    "audio_injector.": "Wan2.2-S2V",
    "casual_audio_encoder.": "Wan2.2-S2V",
    "control_adapter.": "camera control",
    "ref_conv.": "Fun control",
}
# A layer of TurboDiffusion's attention, which is no Wan model's.
_SPARSE_LINEAR = ".proj_l."
# Statistics of the Wan 2.2 autoencoder's latents. Source: Wan2.2 wan/modules/vae2_2.py, Wan2_2_VAE.
LATENTS_MEAN_22 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENTS_STD_22 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


def refuse_other_transformers(source: str, names: Iterable[str]) -> None:
    """Refuse by name a transformer that does more than text and image to video."""
    for start, what in OTHER_TRANSFORMERS.items():
        if any(name.startswith(start) for name in names):
            raise ValueError(f"{source} is a transformer for {what}, which is not supported")
    if any(_SPARSE_LINEAR in name for name in names):
        raise ValueError(
            f"{source} is a transformer with sparse-linear attention (SLA, of TurboDiffusion), which is not "
            "supported: plain attention computes another video"
        )


def transformer_config(source: str, shapes: Shapes, head_dim: int | None = None) -> dict[str, Any]:
    """Return the transformer's configuration, from shapes by official names.

    The shapes do not determine the size of a head, which is 128 in every released transformer.
    """
    get = shape_getter(source, shapes)
    dim, in_channels, *patch = _patch_embedding(source, get)
    freq_dim = get("time_embedding.0.weight", 2)[1]
    if freq_dim % 2:
        raise ValueError(
            f"{source} is no {_KNOWN}: time_embedding.0.weight has {freq_dim} inputs, an odd number"
        )
    head_dim = head_dim or HEAD_DIM
    heads, rest = divmod(dim, head_dim)
    if rest:
        rule = f"its size {dim} is not a multiple of {head_dim}, the size of a head; give attention_head_dim"
        raise ValueError(f"{source} is no {_KNOWN}: {rule}")
    image = get("img_emb.proj.0.weight", 1) if "img_emb.proj.0.weight" in shapes else None
    positions = get("img_emb.emb_pos", 3) if "img_emb.emb_pos" in shapes else None
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": get("head.head.weight", 2)[0] // math.prod(patch),
        "text_dim": get("text_embedding.0.weight", 2)[1],
        "freq_dim": freq_dim,
        "ffn_dim": get("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": _count(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": get("blocks.0.cross_attn.k_img.weight", 2)[1] if image else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def _patch_embedding(source: str, get: "_Getter") -> tuple[int, ...]:
    """Return the patch embedding's shape, which GGUF's four axes have no room for.

    Converters merge some of its axes; the patch size is then taken to be that of every release.
    """
    shape = get("patch_embedding.weight")
    if len(shape) == 5:
        return shape
    (dim,) = get("patch_embedding.bias", 1)
    in_channels, rest = divmod(math.prod(shape), dim * math.prod(PATCH_SIZE))
    if rest:
        rule = f"patch_embedding.weight is {shape}, which is not for {dim} outputs and patches {PATCH_SIZE}"
        raise ValueError(f"{source} is no {_KNOWN}: {rule}")
    return dim, in_channels, *PATCH_SIZE


@dataclass(frozen=True)
class AutoencoderLayout:
    """How an autoencoder's blocks are grouped, which its tensors' names depend on."""

    residual: bool  # Wan 2.2's, with a shortcut around each resolution
    levels: int  # resolutions
    blocks: int  # residual blocks per resolution of the encoder; the decoder has one more

    def ends(self) -> Iterator[tuple[str, str]]:
        """Yield for each resolution the official names of its last residual block and of its downsampler."""
        for level in range(self.levels):
            if self.residual:
                start, first = f"encoder.downsamples.{level}.downsamples", 0
            else:
                start, first = "encoder.downsamples", level * (self.blocks + 1)
            yield f"{start}.{first + self.blocks - 1}", f"{start}.{first + self.blocks}"


def autoencoder_layout(names: Iterable[str]) -> AutoencoderLayout:
    """Return an autoencoder's layout, inferred from its tensors' names, official ones or ours."""
    names = set(names)
    if levels := _count(names, "decoder.up_blocks"):
        residual = _count(names, "encoder.down_blocks.0.resnets") > 0
        return AutoencoderLayout(residual, levels, _count(names, "decoder.up_blocks.0.resnets") - 1)
    layers = _count(names, "encoder.downsamples")
    if _count(names, "encoder.downsamples.0.downsamples"):
        return AutoencoderLayout(True, layers, _count(names, f"encoder.downsamples.{layers - 1}.downsamples"))
    levels = 1 + sum(f"encoder.downsamples.{i}.resample.1.weight" in names for i in range(layers))
    return AutoencoderLayout(False, levels, (layers + 1) // levels - 1)


def autoencoder_config(source: str, shapes: Shapes) -> dict[str, Any]:
    """Return the autoencoder's configuration, from shapes by official names.

    Statistics of the latents are those of the released autoencoder with as many channels.
    """
    get, layout = shape_getter(source, shapes), autoencoder_layout(shapes)
    z_dim, (base, patched) = get("conv2.weight", 5)[0], get("encoder.conv1.weight", 5)[:2]
    decoder_base = get("decoder.head.2.weight", 5)[1]
    widths = [get(f"{block}.residual.2.weight", 5)[0] for block, _ in layout.ends()]
    steps = [f"{downsampler}.time_conv.weight" in shapes for _, downsampler in layout.ends()]
    statistics = {"latents_mean": LATENTS_MEAN_22, "latents_std": LATENTS_STD_22} if z_dim == 48 else {}
    patch = math.isqrt(patched // 3)
    if 3 * patch * patch != patched:
        raise ValueError(f"{source} is no {_KNOWN}: encoder.conv1.weight has {patched} inputs, not 3 a pixel")
    return statistics | {
        "base_dim": base,
        "decoder_base_dim": None if decoder_base == base else decoder_base,
        "z_dim": z_dim,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": layout.blocks,
        "temperal_downsample": steps[:-1],
        "is_residual": layout.residual,
        "in_channels": patched,
        "out_channels": get("decoder.head.2.weight", 5)[0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": 2 ** (layout.levels - 1) * patch,
    }


def text_encoder_config(source: str, shapes: Shapes) -> dict[str, Any]:
    """Return umT5's configuration, from shapes by transformers' names."""
    get, block = shape_getter(source, shapes, "umT5"), "encoder.block.0.layer"
    vocabulary, dim = get("shared.weight", 2)
    buckets, heads = get(f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": get(f"{block}.0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": get(f"{block}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_heads": heads,
        "num_layers": _count(shapes, "encoder.block"),
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def image_encoder_config(source: str, shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of CLIP's image encoder, from shapes by transformers' names."""
    get = shape_getter(source, shapes, "CLIP image encoder")
    dim, _, _, patch = get("embeddings.patch_embedding.weight", 4)
    return {
        "hidden_size": dim,
        "intermediate_size": get("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_attention_heads": dim // CLIP_HEAD_DIM,
        "num_hidden_layers": _count(shapes, "encoder.layers"),
        "image_size": math.isqrt(get("embeddings.position_embedding.weight", 2)[0] - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


class _Getter(Protocol):
    def __call__(self, name: str, axes: int | None = None) -> tuple[int, ...]: ...


def shape_getter(source: str, shapes: Shapes, what: str = _KNOWN) -> _Getter:
    """Return a function that gives the shape of a tensor, which has so many axes, none of them empty."""

    def get(name: str, axes: int | None = None) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"{source} is no {what}: it has no {name}")
        shape = shapes[name]
        if 0 in shape or len(shape) != (len(shape) if axes is None else axes):
            rule = "it must have no empty axis" if axes is None else f"it must have {axes} axes, none empty"
            raise ValueError(f"{source} is no {what}: {name} has shape {shape}, {rule}")
        return shape

    return get


def _count(names: Iterable[str], start: str) -> int:
    """Return how many numbers follow this start of a name."""
    return len({name[len(start) + 1 :].split(".")[0] for name in names if name.startswith(f"{start}.")})
