"""Load umT5 from any file: the official .pth, transformers' names, ComfyUI's scaled float8, GGUF."""

from pathlib import Path
from typing import Any

import torch

from ..files.quantized import QuantizedTensor, expanded
from ..files.weights import WeightFile, read_weights
from ..naming.configs import Shapes
from ..naming.dialects import Tensors, normalize
from ..naming.keys import TEXT_ENCODER, TEXT_ENCODER_GGUF
from ..naming.names import listed, shapes_of
from .fill import empty_weights, fill

EMBEDDING, COPY = "shared.weight", "encoder.embed_tokens.weight"
# Parts of the whole umT5 that encoding does not need, and the tokenizer inside ComfyUI's file.
UNUSED = ("decoder.", "lm_head.", "dec.", "output.", "spiece_model")


def load_text_encoder(path: str | Path, dtype: torch.dtype | None = None, dequantize: bool = False) -> Any:
    """Load umT5's encoder from a weight file of any format.

    Args:
        path: a file, or a folder of shards.
        dtype: of the parameters; None: as they are stored, bfloat16 for those that were quantised.
        dequantize: whether to expand quantised weights, which stay quantised otherwise.

    Returns: transformers' UMT5EncoderModel, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: the file cannot be read, is another model's, or holds weights that have no place.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    file = read_weights(Path(path).expanduser())
    kept = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(UNUSED)}
    tensors = named_by_transformers(file.source, normalize(WeightFile(file.source, kept, file.metadata)))
    tensors[EMBEDDING] = tensors[COPY] = embedding_of(file.source, tensors)
    config = UMT5Config(**text_encoder_config(file.source, shapes_of(tensors)))
    with empty_weights():
        model = UMT5EncoderModel(config)
    in_float32 = model._keep_in_fp32_modules if dtype == torch.float16 else ()
    fill(model, file.source, tensors, dtype, dequantize, in_float32 or ())
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def named_by_transformers(source: str, tensors: Tensors) -> Tensors:
    """Give tensors transformers' names."""
    tables = (TEXT_ENCODER, TEXT_ENCODER_GGUF)
    table = max(tables, key=lambda table: table.count(tensors))
    ours = table.inverse
    if table.count(tensors) > ours.count(tensors):
        names = {name: table.rename(name) for name in tensors}
    else:
        names = {name: name if name == COPY or ours.rename(name) else None for name in tensors}
    if unknown := [name for name, other in names.items() if other is None]:
        raise ValueError(f"{source} holds {listed(unknown)}, which umT5 has no place for")
    return {other: tensors[name] for name, other in names.items() if other is not None}


def embedding_of(source: str, tensors: Tensors) -> torch.Tensor | QuantizedTensor:
    """Return the tokens' embedding, which files hold under one name or under two.

    Raises:
        ValueError: there is none, it is all zero, or the two differ.
    """
    found = [tensors[name] for name in (EMBEDDING, COPY) if name in tensors]
    if not found:
        raise ValueError(f"{source} is no umT5: it has no {EMBEDDING}")
    values = [expanded(tensor) for tensor in found]
    if not all(torch.equal(value, values[0]) for value in values):
        raise ValueError(f"{source}: {EMBEDDING} and {COPY} differ; they must be the same")
    if not values[0].any():
        raise ValueError(f"{source}: {EMBEDDING} is all zero")
    return found[0]


def text_encoder_config(source: str, shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of umT5 with these tensors, under transformers' names."""

    def get(name: str) -> tuple[int, ...]:
        name = f"encoder.block.0.layer.{name}.weight"
        if name not in shapes:
            raise ValueError(f"{source} is no umT5: it has no {name}")
        return shapes[name]

    buckets, heads = get("0.SelfAttention.relative_attention_bias")
    width, (vocabulary, model) = get("0.SelfAttention.q")[0], shapes[EMBEDDING]
    return {
        "vocab_size": vocabulary,
        "d_model": model,
        "d_kv": width // heads,
        "d_ff": get("1.DenseReluDense.wi_0")[0],
        "num_heads": heads,
        "num_layers": len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}),
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }
