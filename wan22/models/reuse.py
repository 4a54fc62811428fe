"""What calls of one transformer have in common: computed once, kept by the caller, never by the model.

Shapes: b batch, l video tokens, s text or image rows, k values of time, d model size, n heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]  # each "b s n d/n"
Value = TypeVar("Value")


@dataclass
class LayerCache:
    """Keys and values of one cross-attention: of the text rows, then of the image rows if there are any.

    None until the layer is first called; it fills them in then, while its weights are there.
    """

    pairs: tuple[KeyValue, ...] | None = None


@dataclass
class TransformerCache:
    """What all calls of one transformer share: the rotary tables and the step's modulation.

    It is valid as long as the transformer's weights are, the strengths of its LoRAs included.
    """

    kept: dict[str, tuple[object, Any]] = field(default_factory=dict)


@dataclass
class PromptCache:
    """What all calls of one transformer with one prompt share; made by the caller, filled by the calls.

    Args:
        shared: of the transformer, for all its prompts.
        text: embedded text rows, "b s d".
        image: embedded image rows, "b s d".
        layers: of each cross-attention.
    """

    shared: TransformerCache = field(default_factory=TransformerCache)
    text: torch.Tensor | None = None
    image: torch.Tensor | None = None
    layers: list[LayerCache] = field(default_factory=list)

    def layer(self, i: int) -> LayerCache:
        """Return the cache of the i-th block's cross-attention."""
        while len(self.layers) <= i:
            self.layers.append(LayerCache())
        return self.layers[i]


def recall(cache: TransformerCache | None, what: str, key: object, compute: Callable[[], Value]) -> Value:
    """Return what a cache keeps of a kind, if its key is this one; compute and keep it otherwise.

    Args:
        cache: None: it is always computed.
        what: the kind, such as "rotary"; one value of each is kept.
        key: all that the value depends on, beside the weights.
        compute: gives the value.
    """
    known, value = (None, None) if cache is None else cache.kept.get(what, (None, None))
    if known is None or known != key:
        value = compute()
        if cache is not None:
            cache.kept[what] = key, value
    return cast(Value, value)


def identity(tensor: torch.Tensor) -> tuple[int, int | None]:
    """Return what changes when a tensor is another one, or is written to; keep the tensor beside it.

    Tensors made in torch.inference_mode do not count what is written to them, and compiled code cannot ask.
    """
    unknown = torch.compiler.is_compiling() or tensor.is_inference()
    return id(tensor), None if unknown else tensor._version
