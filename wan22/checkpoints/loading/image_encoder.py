"""Load the CLIP image encoder of Wan 2.1 from its official file."""

import math
from pathlib import Path
from typing import Any

import torch

from ..files.quantized import expanded
from ..files.weights import read_weights
from ..naming.dialects import Tensors
from ..naming.keys import IMAGE_ENCODER
from ..naming.names import listed
from .fill import empty_weights, fill

HEAD_DIM = 80  # of the released one, ViT-H
_FUSED = "attn.to_qkv."
# The text half of CLIP, and what follows the rows that Wan takes.
_UNUSED = ("textual.", "log_scale", "visual.head")


def load_image_encoder(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Load the image half of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.

    Args:
        path: the file.
        dtype: of the parameters; None: as they are stored.

    Returns: transformers' CLIPVisionModel, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is another model's, or holds weights that have no place.

    Source: Wan2.1 wan/modules/clip.py, VisionTransformer.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    file = read_weights(Path(path).expanduser())
    tensors = _renamed(file.source, {n: t for n, t in file.tensors.items() if not n.startswith(_UNUSED)})
    config = CLIPVisionConfig(**_config(file.source, tensors))
    with empty_weights():
        model = CLIPVisionModel(config)
    # Some releases of transformers have everything one level deeper.
    inner: Any = getattr(model, "vision_model", model)
    prefix = "" if inner is model else "vision_model."
    fill(model, file.source, {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, dtype)
    positions = tensors["embeddings.position_embedding.weight"].shape[0]
    inner.embeddings.position_ids = torch.arange(positions)[None]  # no weight, so in no file
    return model


def load_image_processor() -> Any:
    """Return the processor that prepares images as the official code does: 224 x 224 without a crop."""
    from transformers import CLIPImageProcessor

    size = {"height": 224, "width": 224}
    return CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size)


def _renamed(source: str, official: Tensors) -> Tensors:
    """Give tensors transformers' names and shapes."""
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in official.items():
        values = expanded(tensor)
        if _FUSED in name:
            for letter, part in zip("qkv", values.chunk(3), strict=True):
                parts[name.replace(_FUSED, f"attn.{letter}.")] = part
        elif name in ("visual.cls_embedding", "visual.pos_embedding"):
            parts[name] = values.squeeze(0) if name == "visual.pos_embedding" else values.flatten()
        else:
            parts[name] = values
    names = {name: IMAGE_ENCODER.rename(name) for name in parts}
    if unknown := [name for name, ours in names.items() if ours is None]:
        raise ValueError(f"{source} holds {listed(unknown)}, which CLIP's image encoder has no place for")
    return {str(names[name]): part for name, part in parts.items()}


def _config(source: str, tensors: Tensors) -> dict[str, Any]:
    """Return the configuration of the encoder with these tensors."""
    needed = ["embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    needed.append("encoder.layers.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{source} is no CLIP image encoder: it has no {missing[0]}")
    (dim, _, _, patch), (positions, _), (hidden, _) = (tensors[name].shape for name in needed)
    return {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_attention_heads": dim // HEAD_DIM,
        "num_hidden_layers": len({n.split(".")[2] for n in tensors if n.startswith("encoder.layers.")}),
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
