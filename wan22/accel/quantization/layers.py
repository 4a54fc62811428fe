"""How a model's layers are quantised, in words that a recipe holds and errors show."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ...checkpoints.files.quantized import ScaledNumbers
from ...checkpoints.quantized_linear import QuantizedLinear
from ...checks import cut, shown
from ...private_apis import uncompiled
from ..offload.layout import blocks_of
from .settings import KINDS, PLAIN, Quantization, in_words


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


def linears_of(model: nn.Module, keep: tuple[int, int] = (0, 0)) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of a model's blocks, by their names in the model.

    `keep` are numbers of blocks, the first and the last ones, that are left out.

    Raises: ValueError: it has no such blocks, or none are left.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} is neither a Wan transformer nor umT5")
    first, last = keep
    if first + last >= len(blocks):
        raise ValueError(f"keep_blocks={shown(keep)} leaves none of the {len(blocks)} blocks to quantise")
    chosen = blocks[first : len(blocks) - last]
    for path, block in model.named_modules():
        if any(block is one for one in chosen):
            for name, module in block.named_modules(prefix=path):
                if isinstance(module, nn.Linear):
                    yield name, module


def plain_blocks(model: nn.Module) -> list[int]:
    """Return the numbers of the blocks of which no layer is quantised, nor was before it was expanded."""
    blocks = blocks_of(uncompiled(model))
    return [i for i, block in enumerate(blocks) if not any(map(_format, block.modules()))]


def formats_of(model: nn.Module) -> dict[str, Any]:
    """Return the number of a model's layers that are quantised each way, {"fp8": 400}; {} if none is.

    Layers that were expanded again count, for they keep the rounded values: "fp8, expanded". Blocks without
    such layers, where others have some, are listed: {"fp8": 380, "blocks kept": "0, 39"}. A model that
    another library has quantised has its settings under that library's name.
    """
    found: dict[str, Any] = dict(Counter(filter(None, map(_format, model.modules()))))
    kept = plain_blocks(model) if found else []
    if 0 < len(kept) < len(blocks_of(uncompiled(model))):
        found[PLAIN] = in_words(kept)
    quantizer = getattr(uncompiled(model), "hf_quantizer", None)
    if quantizer is not None and (config := getattr(quantizer, "quantization_config", None)) is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        method = settings.get("quant_method", type(config).__name__)
        # As text: the values may be of any type, dtypes and classes among them.
        found[str(getattr(method, "value", method))] = {str(k): str(v) for k, v in sorted(settings.items())}
    return dict(sorted(found.items()))


def needs_quantizing(model: nn.Module, settings: Quantization) -> bool:
    """Whether a model is still to be quantised as settings say: False if it has been, in the same way.

    Raises: ValueError: it is quantised in another way.
    """
    if not is_quantized(model):
        return True
    inner = uncompiled(model)
    found, first, last = formats_of(model), *settings.kept
    count = len(blocks_of(inner))
    kept = [*range(first), *range(count - last, count)]
    same = found.keys() - {PLAIN} == {*_expected(inner, settings)}
    if same and plain_blocks(model) == kept:
        return False
    wanted = cut(str(settings))
    raise ValueError(
        f"this {type(inner).__name__} is quantised already ({cut(as_text(found))}), and {wanted} would round "
        "it twice, or not at all; load it again to quantise it by another method, or leave quantize out"
    )


def as_text(formats: Mapping[str, Any]) -> str:
    """Return what `formats_of` has found in a few words: "fp8, blocks kept: 0, 39"."""
    kept = formats.get(PLAIN)
    return ", ".join(name for name in formats if name != PLAIN) + (f", {PLAIN}: {kept}" if kept else "")


def _expected(model: nn.Module, settings: Quantization) -> Iterator[Any]:
    """Yield the formats that settings give a model's layers; a configuration of torchao's is its own."""
    if settings.block is None:
        yield settings.method
        return
    for _, layer in linears_of(model, settings.kept):
        yield ScaledNumbers(KINDS[settings.method], layer.in_features // settings.block).name


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
