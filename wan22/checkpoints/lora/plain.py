"""State dicts with plain weights, whatever PEFT, torchao or a cast has made of a model."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...private_apis import layerwise_casting, uncompiled
from ..quantized_linear import expanded_state
from .adapters import adapters_of

_OF_ADAPTERS = re.compile(r"\.(lora|lokr|hada)_")


@contextmanager
def plain_state(models: Iterable[Any], merge_lora: bool = False) -> Iterator[None]:
    """Let models' state dicts hold what every program reads, under the names of the models' own layers.

    Fused LoRAs are in the weights, those that are not active are left out. Quantised weights are expanded;
    those of layerwise casting have the dtype that they compute in, which keeps every value.

    Raises:
        ValueError: a LoRA is active without being fused, and `merge_lora` is False; or it cannot be merged.
    """
    with ExitStack() as stack:
        stack.enter_context(expanded_state())
        for model in map(uncompiled, models):
            if active := adapters_of(model).unfused:
                if not merge_lora:
                    raise ValueError(
                        f"the LoRA {', '.join(active)} is active, but not in the weights to be saved; "
                        "save_pretrained(..., merge_lora=True) saves them with it, after disable_lora() "
                        "they are saved without"
                    )
                stack.enter_context(adapters_of(model).merged(active))
            stack.callback(model.register_state_dict_post_hook(_make_plain).remove)
        yield


def _make_plain(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    computed = {
        f"{prefix}{path}": casting.compute_dtype
        for path, module in model.named_modules()
        if (casting := layerwise_casting(module)) is not None
    }
    plain = {}
    for key, tensor in state.items():
        if _OF_ADAPTERS.search(key):
            continue
        if type(tensor).dequantize is not torch.Tensor.dequantize:  # torchao's
            tensor = tensor.dequantize()
        if (dtype := computed.get(key.rpartition(".")[0])) is not None:
            tensor = tensor.to(dtype)
        plain[key.replace(".base_layer", "")] = tensor
    state.clear()
    state.update(plain)
