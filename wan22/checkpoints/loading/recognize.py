"""Recognise what a weight file or a model's folder holds: one way for loaders, converter and `wan22 info`."""

from pathlib import Path
from typing import Any

from ...checks import listed
from ..files.weights import WeightFile, read_weights
from ..naming.dialects import parts_of, stripped
from ..naming.names import count_known
from ..naming.schemas import read_config
from .encoders import IMAGE_ENCODER_FORMAT, TEXT_ENCODER_FORMAT
from .models import AUTOENCODER_FORMAT, TRANSFORMER_FORMAT
from .stored import StoredModel, read_as

RECOGNIZED = {format.kind: format for format in (TRANSFORMER_FORMAT, AUTOENCODER_FORMAT, TEXT_ENCODER_FORMAT)}
FORMATS = {**RECOGNIZED, "image_encoder": IMAGE_ENCODER_FORMAT}  # which is read only where it is expected


def read_model(
    path: Path,
    kind: str | None = None,
    config: dict[str, Any] | None = None,
    head_dim: int | None = None,
) -> StoredModel:
    """Read what a model's file or folder says without its weights: names, shapes, dtypes, configuration.

    Args:
        path: safetensors, .pth or GGUF file, index of shards, or folder with one file or one index.
        kind: one of `FORMATS`; None: the one of `RECOGNIZED` that knows the most of the tensors' names.
        config: contents of config.json; None: that of the folder, if path is one.
        head_dim: size of a transformer's head where no config.json has it; None: 128, as in all releases.
    """
    file = read_weights(path)
    if config is None:
        config = read_config(path / "config.json")
    kind = kind or _recognize(file)
    known = {"attention_head_dim": head_dim} if head_dim and kind == "transformer" else {}
    return read_as(FORMATS[kind], file, config, known)


def kinds_in(path: Path) -> list[str]:
    """Return the kinds of models in a file that holds several; [] for any other file or folder."""
    return [] if path.is_dir() else list(parts_of(read_weights(path).tensors))


def _recognize(file: WeightFile) -> str:
    if parts := parts_of(file.tensors):
        raise ValueError(f"{file.source} holds several models: {', '.join(parts)}; say which one is meant")
    names = list(stripped(file.tensors).values())
    counts = {
        kind: max(count_known(names, table) for table in format.tables(names))
        for kind, format in RECOGNIZED.items()
    }
    best = max(counts, key=lambda kind: counts[kind])
    if not counts[best]:
        raise ValueError(
            f"{file.source} is neither a transformer, nor a VAE, nor a text encoder of Wan; "
            f"it holds {listed(names) if names else 'nothing'}"
        )
    return best
