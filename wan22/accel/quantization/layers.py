"""How a model's layers are quantised, in words that a recipe holds and errors show."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ...checkpoints.quantized_linear import QuantizedLinear
from ...checks import cut
from ...private_apis import uncompiled
from ..offload.layout import blocks_of


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has quantised layers, from a file or by `quantize`."""
    return any(is_quantized_layer(module) for module in model.modules())


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a layer is one of ours, or its weight is a tensor subclass such as torchao's."""
    if isinstance(module, QuantizedLinear):
        return True
    weight = module.weight if isinstance(module, nn.Linear) else None
    # A weight divided among ranks is of a subclass, too, but not quantised.
    return hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor)


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of a model's blocks, by their names in the model."""
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} is neither a Wan transformer nor umT5")
    for path, block in model.named_modules():
        if any(block is one for one in blocks):
            for name, module in block.named_modules(prefix=path):
                if isinstance(module, nn.Linear):
                    yield name, module


def formats_of(model: nn.Module) -> dict[str, Any]:
    """Return the number of a model's layers that are quantised each way, {"fp8": 400}; {} if none is.

    Layers that were expanded again count, for they keep the rounded values: "fp8, expanded". A model that
    another library has quantised has its settings under that library's name.
    """
    found: dict[str, Any] = dict(Counter(filter(None, map(_format, model.modules()))))
    quantizer = getattr(uncompiled(model), "hf_quantizer", None)
    if quantizer is not None and (config := getattr(quantizer, "quantization_config", None)) is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        method = settings.get("quant_method", type(config).__name__)
        # As text: the values may be of any type, dtypes and classes among them.
        found[str(getattr(method, "value", method))] = {str(k): str(v) for k, v in sorted(settings.items())}
    return dict(sorted(found.items()))


def needs_quantizing(model: nn.Module, method: Any) -> bool:
    """Whether a model is still to be quantised by a method: False if it has been, by the same one.

    Raises: ValueError: it is quantised in another way.
    """
    if not is_quantized(model):
        return True
    found = formats_of(model)
    if found.keys() == {method}:
        return False
    wanted, kind = cut(method if isinstance(method, str) else type(method).__name__), type(uncompiled(model))
    raise ValueError(
        f"this {kind.__name__} is quantised already ({cut(', '.join(found))}), and {wanted} would round it "
        "twice, or not at all; load it again to quantise it by another method, or leave quantize out"
    )


def _format(layer: nn.Module) -> str | None:
    """Return how one layer is quantised, or was before it was expanded; None if it never was."""
    before = getattr(layer, "expanded_from", None)
    if not is_quantized_layer(layer):
        return before
    if isinstance(layer, QuantizedLinear):
        now = layer.method
    else:
        weight: Any = layer.weight
        inner = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        parts = (f"{n} {str(t.dtype).removeprefix('torch.')}" for n, t in inner.items())
        shared = {n: weight.numel() // t.numel() for n, t in inner.items() if t.numel()}
        now = f"{type(weight).__name__} ({', '.join(parts)}; values to each: {list(shared.values())})"
    return now if before is None else f"{before}, {now}"
