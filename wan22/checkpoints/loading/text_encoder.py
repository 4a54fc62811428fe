"""Load umT5 from any file: the official .pth, transformers' names, ComfyUI's scaled float8, GGUF."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.quantized import expanded
from ..naming.configs import Shapes, text_encoder_config
from ..naming.dialects import Tensors
from ..naming.keys import TEXT_ENCODER, TEXT_ENCODER_GGUF, KeyTable
from .fill import empty_weights
from .stored import Config, ModelFormat, read_as

# One weight under two names; files have it under one or under both.
_EMBEDDING, _COPY = "shared.weight", "encoder.embed_tokens.weight"


class _TextEncoderFormat(ModelFormat):
    kind = "text_encoder"
    noun = "umT5"
    # Parts of the whole umT5 that encoding does not need, and the tokenizer inside ComfyUI's file.
    unused = ("decoder.", "lm_head.", "dec.", "output.", "spiece_model")

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

    def build(self, config: Config) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        with empty_weights():
            return UMT5EncoderModel(UMT5Config.from_dict(config))

    def settings(self, config: Config) -> Config:
        from transformers import UMT5Config

        settings = UMT5Config.from_dict(config)
        settings.architectures = ["UMT5EncoderModel"]
        return json.loads(settings.to_json_string())

    def checked(self, source: str, tensors: Tensors) -> Tensors:
        embedding, copy = tensors[_EMBEDDING], tensors[_COPY]
        values = expanded(embedding)
        if copy is not embedding and not torch.equal(expanded(copy), values):
            raise ValueError(f"{source}: {_EMBEDDING} and {_COPY} differ; they must be the same")
        if not values.any():
            raise ValueError(f"{source}: {_EMBEDDING} is all zero")
        return tensors

    def in_float32(self, model: Any, dtype: torch.dtype | None) -> Iterable[str]:
        return (model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()  # as transformers does

    def finished(self, model: Any) -> nn.Module:
        model.encoder.embed_tokens.weight = model.shared.weight
        return model


TEXT_ENCODER_FORMAT = _TextEncoderFormat()


def load_text_encoder(path: str | Path, dtype: torch.dtype | None = None, dequantize: bool = False) -> Any:
    """Load umT5's encoder, transformers' UMT5EncoderModel, from a file of any format or a folder of shards.

    Args and errors as of `WanTransformer3DModel.from_single_file`.
    """
    return read_as(TEXT_ENCODER_FORMAT, Path(path)).load(dtype, dequantize)
