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


class TextEncoderFormat(ModelFormat):
    """umT5's encoder, transformers' UMT5EncoderModel."""

    kind = "text_encoder"
    noun = "umT5"
    # Parts of the whole umT5 that encoding does not need, and the tokenizer inside ComfyUI's file.
    unused = ("decoder.", "lm_head.", "dec.", "output.", "spiece_model")

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        """Return the official files' table, and GGUF's."""
        return TEXT_ENCODER, TEXT_ENCODER_GGUF

    def names(self, source: str, names: Iterable[str]) -> dict[str, str]:
        """Return the file's name of each of transformers' names, the embedding's two included."""
        names = set(names)
        found = super().names(source, sorted(names - {_COPY}))
        if _COPY in names:
            found[_COPY] = _COPY
        for name, other in ((_EMBEDDING, _COPY), (_COPY, _EMBEDDING)):
            if other in found:
                found.setdefault(name, found[other])
        return found

    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> dict[str, Any]:
        """Return UMT5Config's arguments."""
        if given.get("model_type") == "umt5":
            return dict(given)
        return text_encoder_config(source, shapes) | known

    def build(self, config: Config) -> nn.Module:
        """Return the encoder on the meta device."""
        from transformers import UMT5EncoderModel

        with empty_weights():
            return UMT5EncoderModel(self._config(config))

    def settings(self, config: Config) -> dict[str, Any]:
        """Return config.json as transformers writes it."""
        settings = self._config(config)
        settings.architectures = ["UMT5EncoderModel"]
        return json.loads(settings.to_json_string())

    def checked(self, source: str, tensors: Tensors) -> Tensors:
        """Return tensors, unless the embedding is all zero, or differs from its copy.

        Raises:
            ValueError: it does.
        """
        embedding, copy = tensors[_EMBEDDING], tensors[_COPY]
        values = expanded(embedding)
        if copy is not embedding and not torch.equal(expanded(copy), values):
            raise ValueError(f"{source}: {_EMBEDDING} and {_COPY} differ; they must be the same")
        if not values.any():
            raise ValueError(f"{source}: {_EMBEDDING} is all zero")
        return tensors

    def in_float32(self, model: Any, dtype: torch.dtype | None) -> Iterable[str]:
        """Return what transformers keeps in float32 in a float16 model."""
        return (model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()

    def finished(self, model: Any) -> nn.Module:
        """Return the model with one embedding under its two names."""
        model.encoder.embed_tokens.weight = model.shared.weight
        return model

    @staticmethod
    def _config(config: Config) -> Any:
        from transformers import UMT5Config

        return UMT5Config.from_dict(dict(config))


def load_text_encoder(path: str | Path, dtype: torch.dtype | None = None, dequantize: bool = False) -> Any:
    """Load umT5's encoder from a weight file of any format.

    Args:
        path: file, or folder of shards.
        dtype: dtype of the parameters; None: as they are stored, bfloat16 for those that were quantised.
        dequantize: whether to expand quantised weights, which stay quantised otherwise.

    Returns: transformers' UMT5EncoderModel, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: the file cannot be read, is another model's, or holds weights that have no place.
    """
    return read_as(TextEncoderFormat(), Path(path)).load(dtype, dequantize)
