"""Models in half the memory: the large linear layers in float8 or int8, with a scale per output or group.

    from wan22.accel import quantize

    quantize.quantize(pipe.transformer, "fp8")

Relative errors of a layer with normally distributed weights and 5,120 or 13,824 inputs, measured: "fp8"
2.6e-2, "int8" 9e-3, "int8" with block=128 6.5e-3, "fp8_dynamic" 3.8e-2; bf16 alone has 1.7e-3. In files:
int8 in tiles of 128 by 128 9.4e-3, NVFP4 9.5e-2.

Shapes: o outputs, i inputs of a linear layer, g groups of inputs with a scale of their own.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from ..checkpoints.files.quantized import ROWS, QuantizedTensor, ScaledNumbers, scaled_numbers
from ..checkpoints.lora.injecting import lora_layers
from ..checkpoints.quantized_linear import QuantizedLinear
from ..checks import cut, shown
from ..host_memory import anonymous_bytes, check_room, trim_heap
from ..private_apis import accelerate_hook, reapply_group_offloading, uncompiled
from ..progress import advance
from .quantization.dynamic_float8 import MULTIPLE, DynamicFloat8Linear
from .quantization.layers import as_text, formats_of, is_quantized, is_quantized_layer, linears_of
from .quantization.report import Report, report
from .quantization.settings import KINDS, Quantization

__all__ = ["DynamicFloat8Linear", "Quantization", "Report", "dequantize", "quantize", "report"]

Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(model: Model, method: Any, block: int | None = None, keep_blocks: Any = None) -> Model:
    """Quantise the large linear layers of a model's blocks in place, one after the other; return the model.

    Those are attention's projections and the feed-forward's layers; norms, embeddings, modulation and head
    stay as they are. The original weights are gone afterwards. LoRAs are loaded after this, not before.

    Args:
        model: a WanTransformer3DModel or umT5 (UMT5EncoderModel), compiled or not.
        method: "fp8" and "int8" keep weights in these dtypes, and compute in the input's; "fp8_dynamic"
            multiplies in float8, too: faster on GPUs of compute capability 8.9 and more, and less accurate,
            as activations are rounded, with a scale per token. Or one of torchao's configurations; or
            `Quantization`, or its text, such as "fp8:keep=1".
        block: number of inputs that share a scale, for "fp8" and "int8"; None: all inputs of an output.
        keep_blocks: how many of the first and of the last blocks stay as they are, (1, 2), or a number for
            both; default is none.

    Raises:
        ValueError: the method is unknown or does not fit a layer, no block is left, or the model is quantised
            already, has LoRAs, or is offloaded piece by piece.
        MemoryError: the host has no room for the quantised weights, which are in no file.
        ImportError: torchao is not installed, and the configuration is not one of the names.
    """
    settings = Quantization.of(method, block=block, keep_blocks=keep_blocks)
    layers = check(model, settings)
    check_memory([layers])
    inner = uncompiled(model)
    if isinstance(settings.method, str):
        for name in list(layers):
            # Taken out of the table, so that only one weight at a time exists twice.
            advance(layers[name].weight.nbytes)
            _put(inner, name, _quantized(layers.pop(name), settings.method, settings.block))
    else:
        _quantize_by_torchao(inner, settings.method, set(layers))
    trim_heap()  # what a layer's rounding took does not stay the process's
    reapply_group_offloading(inner)  # so that the new layers are offloaded, too
    return model


def check(model: nn.Module, settings: Quantization) -> dict[str, nn.Linear]:
    """Refuse what `quantize` refuses; return the layers that it would quantise, by name."""
    if settings.only is not None:
        raise ValueError(
            f"only={shown(settings.only)} names an expert of a pipeline; leave it out for one model"
        )
    layers, method = _layers_to_quantize(uncompiled(model), settings.kept), settings.method
    if isinstance(method, str):
        _check_fit(method, settings.block, layers)
        if KINDS[method].is_floating_point and get_module_execution_device(model).type == "mps":
            raise ValueError(f"method {shown(method)}: MPS has no float8; 'int8' is the nearest")
    return layers


def check_memory(models: Iterable[Mapping[str, nn.Linear]]) -> None:
    """Refuse, with a MemoryError, to quantise layers of models, by name, if the host has no room for that."""
    weights = [layer.weight for layers in models for layer in layers.values()]
    taken = sum(weight.numel() for weight in weights if weight.device.type == "cpu")
    advice = "load weights that are quantised already, such as `wan22 prepare --dtype fp8` writes"
    check_room(taken - anonymous_bytes(weights), "quantizing", advice)


def dequantize(model: Model) -> Model:
    """Make ordinary layers of quantised ones in place, those from files included; return the model.

    Weights keep the quantised values: only loading the model again brings the original ones back.

    Raises: ValueError: no layer is quantised.
    """
    inner = uncompiled(model)
    names = [name for name, module in inner.named_modules() if is_quantized_layer(module)]
    if not names:
        raise ValueError(f"no layer of this {type(inner).__name__} is quantised")
    for name in names:
        layer = inner.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            _put(inner, name, layer.expand())
        else:
            before = f"{next(iter(formats_of(layer)))}, expanded"
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
            vars(layer)["expanded_from"] = before
    reapply_group_offloading(inner)
    return model


# ---- one layer ----


def _quantized(linear: nn.Linear, method: str, block: int | None) -> QuantizedLinear:
    kind, groups = KINDS[method], linear.in_features // (block or linear.in_features)
    pairs = [scaled_numbers(rows, kind, groups) for rows in linear.weight.detach().split(ROWS)]
    data, scale = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    shape = (linear.out_features, linear.in_features)
    tensor = QuantizedTensor(shape, ScaledNumbers(kind, groups), {"data": data, "scale": scale})
    layer = DynamicFloat8Linear if method == "fp8_dynamic" else QuantizedLinear
    bias = None if linear.bias is None else linear.bias.detach()
    quantized = layer(tensor, bias, linear.weight.dtype).train(linear.training)
    if (before := getattr(linear, "expanded_from", None)) is not None:
        vars(quantized)["expanded_from"] = before
    return quantized


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


# ---- which layers ----


def _layers_to_quantize(model: nn.Module, keep: tuple[int, int]) -> dict[str, nn.Linear]:
    kind, layers = type(model).__name__, dict(linears_of(model, keep))
    if lora_layers(model):
        raise ValueError(
            f"this {kind} has LoRAs, whose strengths could not be changed later; call unload_lora_weights() "
            "first, and load them again afterwards"
        )
    if is_quantized(model):
        found = cut(as_text(formats_of(model)))
        raise ValueError(
            f"this {kind} is quantised already ({found}); load it again to quantise it by another method, or "
            "call dequantize first, which keeps the rounded values"
        )
    for name, layer in layers.items():
        if accelerate_hook(layer) and layer.weight.is_meta:
            raise ValueError(
                f"{name}.weight is not there (offloaded piece by piece); quantize before "
                "enable_sequential_cpu_offload"
            )
        if layer.weight.dtype not in DTYPES:
            raise ValueError(
                f"{name}.weight is stored in {layer.weight.dtype}; it must be one of "
                f"{', '.join(map(str, DTYPES))}"
            )
    return layers


def _check_fit(method: str, block: int | None, layers: Mapping[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        o, i = layer.out_features, layer.in_features
        if block is not None and i % block:
            raise ValueError(f"block={block} does not divide the {i} inputs of {name}")
        if method == "fp8_dynamic" and (o % MULTIPLE or i % MULTIPLE):
            raise ValueError(
                f"{name} has {i} inputs and {o} outputs; fp8_dynamic needs multiples of {MULTIPLE}"
            )


def _quantize_by_torchao(model: nn.Module, config: Any, names: set[str]) -> None:
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        message = f"{type(config).__name__} is taken for torchao's configuration: pip install torchao"
        raise ImportError(message) from error
    quantize_(model, config, filter_fn=lambda module, name: name in names)
