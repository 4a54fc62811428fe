"""Load the CLIP image encoder of Wan 2.1 from its official file, or under transformers' names."""

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


class ImageEncoderFormat(ModelFormat):
    """The image half of CLIP, transformers' CLIPVisionModel."""

    kind = "image_encoder"
    noun = "CLIP's image encoder"
    # The text half of CLIP, and what follows the layer whose output Wan takes.
    unused = ("textual.", "log_scale", "visual.head")

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        """Return the official file's table."""
        return (IMAGE_ENCODER,)

    def prepare(self, tensors: Tensors) -> Tensors:
        """Divide the official queries, keys and values, and give the embeddings transformers' shapes."""
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

    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> dict[str, Any]:
        """Return CLIPVisionConfig's arguments."""
        if given.get("model_type") == "clip_vision_model":
            return dict(given)
        return image_encoder_config(source, shapes) | known

    def build(self, config: Config) -> nn.Module:
        """Return the encoder on the meta device."""
        from transformers import CLIPVisionModel

        with empty_weights():
            return CLIPVisionModel(self._config(config))

    def settings(self, config: Config) -> dict[str, Any]:
        """Return config.json as transformers writes it."""
        settings = self._config(config)
        settings.architectures = ["CLIPVisionModel"]
        return json.loads(settings.to_json_string())

    def body(self, model: nn.Module) -> nn.Module:
        """Return what some releases of transformers have one level deeper."""
        return getattr(model, "vision_model", model)

    def finished(self, model: nn.Module) -> nn.Module:
        """Return the model with numbered positions, which no file holds."""
        embeddings: Any = self.body(model).embeddings
        device = embeddings.class_embedding.device
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
        return model

    @staticmethod
    def _config(config: Config) -> Any:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig.from_dict(dict(config))


def load_image_encoder(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Load the image half of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.

    Args:
        path: the file.
        dtype: dtype of the parameters; None: as they are stored.

    Returns: transformers' CLIPVisionModel, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is another model's, or holds weights that have no place.

    Source: Wan2.1 wan/modules/clip.py, VisionTransformer.
    """
    return read_as(ImageEncoderFormat(), Path(path)).load(dtype)


def load_image_processor() -> Any:
    """Return the processor that prepares images as the official code does: 224 x 224 without a crop."""
    from transformers import CLIPImageProcessor

    size = {"height": 224, "width": 224}
    return CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size)
