"""Load Wan 2.1's CLIP image encoder from its official file, or under transformers' names."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.quantized import expanded
from ..naming.configs import Shapes, image_encoder_config
from ..naming.dialects import Tensors
from ..naming.keys import IMAGE_ENCODER, KeyTable
from .fill import empty_weights
from .stored import Config, ModelFormat, read_as

_FUSED = "attn.to_qkv."
_PREFIX = "vision_model."  # of all names in some releases of transformers, and in their files


class _ImageEncoderFormat(ModelFormat):
    kind = "image_encoder"
    noun = "CLIP's image encoder"
    # The text half of CLIP, and what follows the layer whose output Wan takes.
    unused = ("textual.", "log_scale", "visual.head")

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        return (IMAGE_ENCODER,)

    def prepare(self, tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(_PREFIX)
            if _FUSED in name:
                for letter, part in zip("qkv", expanded(tensor).chunk(3), strict=True):
                    result[name.replace(_FUSED, f"attn.{letter}.")] = part
            elif name == "visual.cls_embedding":
                result[name] = expanded(tensor).flatten()
            elif name == "visual.pos_embedding":
                result[name] = expanded(tensor).squeeze(0)
            else:
                result[name] = tensor
        return result

    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config:
        own = given.get("model_type") == "clip_vision_model"
        return given if own else image_encoder_config(source, shapes)

    def build(self, config: Config) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        with empty_weights():
            return CLIPVisionModel(CLIPVisionConfig.from_dict(config))

    def settings(self, config: Config) -> Config:
        from transformers import CLIPVisionConfig

        settings = CLIPVisionConfig.from_dict(config)
        settings.architectures = ["CLIPVisionModel"]
        return json.loads(settings.to_json_string())

    def body(self, model: nn.Module) -> nn.Module:
        return getattr(model, _PREFIX[:-1], model)

    def finished(self, model: nn.Module) -> nn.Module:
        embeddings: Any = self.body(model).embeddings
        positions = torch.arange(embeddings.num_positions, device=embeddings.class_embedding.device)
        embeddings.position_ids = positions[None]  # in no file
        return model


IMAGE_ENCODER_FORMAT = _ImageEncoderFormat()


def load_image_encoder(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Load transformers' CLIPVisionModel from models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.

    Args and errors as of `WanTransformer3DModel.from_single_file`.

    Source: Wan2.1 wan/modules/clip.py, VisionTransformer.
    """
    return read_as(IMAGE_ENCODER_FORMAT, Path(path)).load(dtype)


def load_image_processor() -> Any:
    """Return the processor that prepares images as the official code does: 224 x 224 without a crop."""
    from transformers import CLIPImageProcessor

    size = {"height": 224, "width": 224}
    return CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size)
