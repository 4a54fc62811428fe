"""Put a LoRA's matrices into PEFT's layers around a transformer's, replace them, and take the layers out.

The factor alpha / r is multiplied into a matrix, so that everything that reads or saves the layers, with or
without the adapter's configuration, computes with the same strength.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checks import listed
from ...models.layers import Float32Linear, at_least_float32
from ...private_apis import mark_peft_layers, reapply_group_offloading, take_hotswap_options
from ..quantized_linear import QuantizedLinear
from .casting import compute_dtype_of, computing, store_as_computed
from .differences import Differences, differences_of
from .weights import AdapterWeights, Lora

# The part of an adapter of each kind that takes the factor alpha / r, the first that it has.
SCALED = ("lora_B", "lokr_w2_b", "lokr_w2", "hada_w2_b")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers in a model by their paths, those of whole differences, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def innermost(layer: Any) -> Any:
    """Return the innermost of PEFT's nested layers, which holds the model's own."""
    while hasattr(layer.base_layer, "base_layer"):
        layer = layer.base_layer
    return layer


def path_of(path: str, layer: Any) -> str:
    """Return the path of the model's own module that one of PEFT's layers is for.

    That of whole differences has a name of its own, as matrices may stand around the same module.
    """
    if isinstance(layer, Differences):
        return f"{layer.path}.differences".removeprefix(".")
    return path.replace(".base_layer", "")


def full_scale(layer: Any, adapter: str) -> float:
    """Return PEFT's scaling of an adapter in one layer at strength 1: alpha / r, or alpha / sqrt(r)."""
    alpha = (layer.lora_alpha if hasattr(layer, "lora_alpha") else layer.alpha)[adapter]
    root = getattr(layer, "use_rslora", {}).get(adapter, False)
    return float(alpha / (layer.r[adapter] ** 0.5 if root else layer.r[adapter]))


def set_scaling(layer: Any, adapter: str, scaling: float) -> None:
    """Set PEFT's scaling of an adapter in one layer; a tensor, as for hotswap, stays the same one."""
    if isinstance(layer.scaling[adapter], Tensor):
        layer.scaling[adapter].fill_(scaling)
    else:
        layer.scaling[adapter] = scaling


def own_layer(model: nn.Module, path: str) -> nn.Module:
    """Return a model's own module, which PEFT's layers may stand around."""
    module = model.get_submodule(path)
    return innermost(module).base_layer if hasattr(module, "base_layer") else module


def inject(model: Any, lora: Lora, adapter: str) -> None:
    """Put an adapter into a model, at strength 1; whole differences are copied, too."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    for path in (*lora.layers, *(name.rpartition(".")[0] for name in lora.deltas)):
        layer = own_layer(model, path)
        if isinstance(layer, Float32Linear):  # so that what is added to its weights is not rounded
            layer.to(at_least_float32(layer.weight.dtype))
    for kind in sorted({weights.kind for weights in lora.layers.values()}):
        layers = {path: weights for path, weights in lora.layers.items() if weights.kind == kind}
        own = [own_layer(model, path) for path in layers]
        for layer in own if kind == "dora" else ():
            store_as_computed(layer)  # PEFT computes with their weights and biases themselves
        with warnings.catch_warnings(), computing(own):
            warnings.simplefilter("ignore", UserWarning)  # several adapters are meant
            inject_adapter_in_model(_config(kind, layers), model, adapter)
        for path, weights in layers.items():
            _fill(model.get_submodule(path), adapter, weights)
    _add_differences(model, lora.deltas, adapter)
    if not lora.layers:  # diffusers looks for an adapter's name there
        if not hasattr(model, "peft_config"):
            model.peft_config = {}
        model.peft_config[adapter] = LoraConfig(r=1, lora_alpha=1, target_modules=[])
    mark_peft_layers(model, True)
    if (options := take_hotswap_options(model)) is not None:
        prepare_model_for_compiled_hotswap(model, config=model.peft_config[adapter], **options)
    reapply_group_offloading(model)  # so that the new layers are offloaded, too


def replace(model: Any, lora: Lora, adapter: str) -> None:
    """Give an adapter's layers other matrices in place; those of smaller rank are filled with zeros.

    Layers that the new LoRA lacks add nothing. A ValueError names a layer that the adapter lacks.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers = {path: layer for path, layer in lora_layers(model).items() if adapter in layer.scaling}
    matrices = {path: layer for path, layer in layers.items() if isinstance(layer, LoraLayer)}
    dora = any(adapter in layer.lora_magnitude_vector for layer in matrices.values())
    plain = not lora.deltas and all(weights.kind == "lora" for weights in lora.layers.values())
    if dora or not plain or len(matrices) < len(layers):
        raise ValueError("hotswap=True takes plain LoRAs, not DoRA, LoKr, LoHa or whole differences")
    if any(adapter in layer.merged_adapters for layer in layers.values()):
        raise ValueError("hotswap=True: the adapter is fused into the weights; call unfuse_lora() first")
    if new := sorted(lora.layers.keys() - matrices.keys()):
        raise ValueError(f"hotswap=True: the loaded adapter lacks {listed(new)}; load this one beside it")
    for path, layer in matrices.items():
        weights = lora.layers.get(path)
        parts = {} if weights is None else _scaled(weights)
        for name in ("lora_A", "lora_B"):
            _overwrite(getattr(layer, name)[adapter], parts.get(name), dimension=int(name == "lora_B"))
        bias: Any = layer.lora_B[adapter].bias
        if bias is not None:
            bias.data.zero_()
        # The factor is in the matrices, whatever PEFT or diffusers has made the adapter with.
        rank = max(layer.r[adapter], 0 if weights is None else weights.rank)
        layer.r[adapter] = layer.lora_alpha[adapter] = rank
        layer.use_rslora[adapter] = False
    ranks = Counter({path: layer.r[adapter] for path, layer in matrices.items()})
    for name, value in _ranks(ranks).items():
        setattr(model.peft_config[adapter], name if name != "alpha" else "lora_alpha", value)
    model.peft_config[adapter].use_rslora = False


def detach(model: Any) -> None:
    """Replace PEFT's layers by the model's own, as these are now."""
    layers = lora_layers(model)
    for path in [path for path, layer in layers.items() if isinstance(layer, Differences)]:
        layers.pop(path).get_base_layer()  # which restores the parameters
        place, _, name = path.rpartition(".")
        delattr(model.get_submodule(place), name)
    for path, layer in layers.items():
        if ".base_layer" not in path:
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    vars(model).pop("peft_config", None)
    mark_peft_layers(model, False)
    reapply_group_offloading(model)


def _config(kind: str, layers: Mapping[str, AdapterWeights]) -> Any:
    """Return PEFT's configuration of an adapter whose factor alpha / r is in the matrices: 1."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    ranks = _ranks({path: weights.rank for path, weights in layers.items()})
    if kind in ("lokr", "loha"):
        return (LoKrConfig if kind == "lokr" else LoHaConfig)(**ranks, target_modules=list(layers))
    alpha = ranks.pop("alpha")
    return LoraConfig(**ranks, lora_alpha=alpha, target_modules=list(layers), use_dora=kind == "dora")


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return {"r": usual, "alpha": usual, "rank_pattern": others, "alpha_pattern": dict(others)}


def _scaled(weights: AdapterWeights) -> dict[str, Tensor]:
    """Return an adapter's parts for one layer, the factor alpha / r multiplied in."""
    factor = weights.scale_alpha / weights.rank
    scaled = next(name for name in SCALED if name in weights.parts)
    # In float32, so that there is one rounding at most, to the layer's dtype.
    return weights.parts | ({scaled: weights.parts[scaled].float() * factor} if factor != 1 else {})


def _fill(layer: Any, adapter: str, weights: AdapterWeights) -> None:
    """Give one of PEFT's layers an adapter's matrices, in the dtype that the layer computes in."""
    base = layer.get_base_layer()
    device = (base.bias if isinstance(base, QuantizedLinear) else base.weight).device
    dtype = compute_dtype_of(base)
    for name in layer.adapter_layer_names:  # PEFT guesses which parts there are
        parts = getattr(layer, name)
        if adapter in parts and name not in weights.parts:
            del parts[adapter]
    for name, tensor in _scaled(weights).items():
        parts = getattr(layer, name)
        weight = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
        if isinstance(parts, nn.ParameterDict):
            parts[adapter] = weight
        elif "magnitude" in name:
            parts[adapter].weight = nn.Parameter(weight.flatten(), requires_grad=False)
        else:
            shape = _shape(tensor, parts[adapter].weight, int(name == "lora_B"))
            parts[adapter].weight = nn.Parameter(weight.reshape(shape), requires_grad=False)
    layer.r[adapter] = weights.rank
    (layer.lora_alpha if hasattr(layer, "lora_alpha") else layer.alpha)[adapter] = weights.rank
    layer.scaling[adapter] = 1.0


def _shape(tensor: Tensor, matrix: Tensor, dimension: int) -> tuple[int, ...]:
    """Return the shape of a file's matrix for a layer's, whose rank is its length in a dimension."""
    shape = list(matrix.shape)
    shape[dimension] = tensor.numel() * matrix.shape[dimension] // matrix.numel()
    return tuple(shape)


def _overwrite(layer: nn.Module, tensor: Tensor | None, dimension: int) -> None:
    """Put a matrix into a layer's in place, filled with zeros to its rank; a larger rank replaces it."""
    matrix = layer.weight
    assert isinstance(matrix, nn.Parameter)
    if tensor is None:
        matrix.data.zero_()
        return
    tensor = tensor.to(matrix).reshape(_shape(tensor, matrix, dimension))
    if tensor.shape[dimension] > matrix.shape[dimension]:
        layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
        return
    matrix.data.zero_()
    matrix.data.narrow(dimension, 0, tensor.shape[dimension]).copy_(tensor)


def _add_differences(model: nn.Module, deltas: Mapping[str, Tensor], adapter: str) -> None:
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, delta in deltas.items():
        path, _, parameter = name.rpartition(".")
        by_module.setdefault(path, {})[parameter] = delta
    for path, tensors in by_module.items():
        module = own_layer(model, path)
        store_as_computed(module)
        differences_of(model, path, module).add(adapter, tensors)
