"""The encoders, which are transformers' models: umT5, and Wan 2.1's CLIP for images."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..files.quantized import QuantizedTensor, expanded
from ..naming import schemas
from ..naming.configs import Shapes, image_encoder_config, text_encoder_config
from ..naming.dialects import Tensors
from ..naming.keys import IMAGE_ENCODER, TEXT_ENCODER, TEXT_ENCODER_GGUF, KeyTable
from .fill import empty_weights
from .stored import Config, ModelFormat

# umT5's embedding: one weight under two names; files have it under one or under both.
_EMBEDDING, _COPY = "shared.weight", "encoder.embed_tokens.weight"
_ROWS = 256  # of the embedding that are looked at, at the least
TOKENIZER = "spiece_model"  # a tensor in ComfyUI's files: sentencepiece's model, byte by byte


class _TransformersFormat(ModelFormat):
    classes: tuple[str, str]  # transformers' names of configuration and model

    def _config(self, config: Config) -> Any:
        import transformers

        return getattr(transformers, self.classes[0]).from_dict(config)

    def build(self, config: Config) -> nn.Module:
        import transformers

        with empty_weights():
            return getattr(transformers, self.classes[1])(self._config(config))

    def settings(self, config: Config) -> Config:
        settings = self._config(config)
        settings.architectures = [self.classes[1]]
        return json.loads(settings.to_json_string())


class _TextEncoderFormat(_TransformersFormat):
    kind = "text_encoder"
    noun = "umT5"
    schema = schemas.TEXT_ENCODER
    classes = ("UMT5Config", "UMT5EncoderModel")
    # Parts of the whole umT5 that encoding does not need, and what ComfyUI has beside it.
    unused = ("decoder.", "lm_head.", "dec.", "output.", TOKENIZER, "logit_scale")

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        return TEXT_ENCODER, TEXT_ENCODER_GGUF

    def names(self, source: str, names: Iterable[str]) -> dict[str, str]:
        found = super().names(source, [name for name in names if name != _COPY])
        if _COPY in names:
            found[_COPY] = _COPY
        for name, other in ((_EMBEDDING, _COPY), (_COPY, _EMBEDDING)):
            if other in found:
                found.setdefault(name, found[other])
        return found

    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config:
        return given if given.get("model_type") == "umt5" else text_encoder_config(source, shapes)

    def check(self, source: str, tensors: Tensors) -> None:
        if _EMBEDDING not in tensors:
            raise ValueError(f"{source} lacks {_EMBEDDING}")
        embedding, copy = tensors[_EMBEDDING], tensors[_COPY]
        if copy is not embedding and not torch.equal(expanded(copy), expanded(embedding)):
            raise ValueError(f"{source}: {_EMBEDDING} and {_COPY} differ; they must be the same")
        values = _spread_rows(embedding)
        if not values.isfinite().all():
            raise ValueError(f"{source}: {_EMBEDDING} has values that are not finite")
        if not values.any():
            raise ValueError(f"{source}: {_EMBEDDING} is all zero")

    def in_float32(self, model: Any, dtype: torch.dtype | None) -> Iterable[str]:
        return (model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()  # as transformers does

    def finished(self, model: Any) -> nn.Module:
        model.encoder.embed_tokens.weight = model.shared.weight
        return model


class _ImageEncoderFormat(_TransformersFormat):
    kind = "image_encoder"
    noun = "CLIP's image encoder"
    schema = schemas.IMAGE_ENCODER
    classes = ("CLIPVisionConfig", "CLIPVisionModel")
    # The text half of CLIP, what follows the layer whose output Wan takes, and numbers from 0 on.
    unused = (
        *("textual.", "log_scale", "visual.head"),
        *("text_model.", "text_projection", "logit_scale", "visual_projection"),
        *("vision_model.embeddings.position_ids", "embeddings.position_ids"),
    )

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        return (IMAGE_ENCODER,)

    def prepare(self, source: str, tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("vision_model.")
            if "attn.to_qkv." in name:  # Source: Wan2.1 wan/modules/clip.py, SelfAttention
                if not tensor.shape or tensor.shape[0] % 3 or not tensor.shape[0]:
                    rule = "it must have as many rows for queries as for keys and values"
                    raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, {rule}")
                for letter, part in zip("qkv", expanded(tensor).chunk(3), strict=True):
                    result[name.replace("to_qkv", letter)] = part
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

    def body(self, model: nn.Module) -> nn.Module:
        return getattr(model, "vision_model", model)  # which some releases of transformers have

    def finished(self, model: nn.Module) -> nn.Module:
        embeddings: Any = self.body(model).embeddings
        positions = torch.arange(embeddings.num_positions, device=embeddings.class_embedding.device)
        embeddings.position_ids = positions[None]  # in no file
        return model


def _spread_rows(matrix: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    """Return rows from all over a matrix, for which 2 GB of umT5's embedding need not be read."""
    count = matrix.shape[0]
    every = torch.arange(0, count, max(1, count // _ROWS))
    return expanded(matrix.rows(every) if isinstance(matrix, QuantizedTensor) else matrix[every])


TEXT_ENCODER_FORMAT = _TextEncoderFormat()
IMAGE_ENCODER_FORMAT = _ImageEncoderFormat()


def load_image_processor() -> Any:
    """Return the processor that prepares images as the official code does: 224 x 224 without a crop."""
    from transformers import CLIPImageProcessor

    size = {"height": 224, "width": 224}
    return CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size)
