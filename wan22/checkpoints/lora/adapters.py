"""LoRAs in one transformer: PEFT's layers around its own, and differences added to its parameters."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...models.layers import Float32Linear, at_least_float32
from ...private_apis import mark_peft_layers, own_tensors, reapply_group_offloading, uncompiled
from ..loading.quantized_linear import QuantizedLinear
from ..naming.names import listed
from .weights import AdapterWeights, Lora


class Adapters:
    """The LoRAs of one transformer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = _shapes(model)
        self.strengths: dict[str, float] = {}  # of every loaded adapter; 0: not active
        self.sources: dict[str, str] = {}  # the files that they came from
        self.enabled = True
        self._deltas: dict[str, dict[str, torch.Tensor]] = {}  # by adapter and parameter
        self._originals: dict[str, torch.Tensor] = {}  # of the parameters that differences are added to
        # Fused layers' weights from before.
        self._unfused: dict[Any, torch.Tensor | QuantizedLinear] = {}

    def load(self, name: str, lora: Lora, strength: float) -> None:
        """Add an adapter, whose weights are copied and multiplied by a strength.

        Whole differences of quantised weights are refused, and any LoRA where weights are absent.
        """
        self._refuse_fused()
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError(
                "weights are offloaded one by one; load LoRAs before enable_sequential_cpu_offload"
            )
        if quantized := [parameter for parameter in lora.deltas if not self._is_plain(parameter)]:
            raise ValueError(
                f"the LoRA has whole differences of {listed(quantized)}, which are quantised; load the "
                "model with dequantize=True, or call wan22.accel.quantize.dequantize"
            )
        for path in (*lora.layers, *(delta.rpartition(".")[0] for delta in lora.deltas)):
            _widen(self.model.get_submodule(path))
        if lora.layers:
            _attach(self.model, lora, name)
        for parameter in lora.deltas.keys() - self._originals.keys():
            self._originals[parameter] = self._parameter(parameter).detach().clone()
        self._deltas[name] = {parameter: delta.clone() for parameter, delta in lora.deltas.items()}
        self.strengths[name], self.sources[name] = strength, lora.source
        self.apply()

    def set(self, strengths: Mapping[str, float]) -> None:
        """Give adapters their strengths; those that are not named are not active."""
        self._refuse_fused()
        self.strengths = {name: strengths.get(name, 0.0) for name in self.strengths}
        self.apply()

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off; their strengths are kept."""
        self._refuse_fused()
        self.enabled = enabled
        self.apply()

    def remove(self, names: Iterable[str]) -> None:
        """Remove adapters; without the last one, the model has its own layers and weights again."""
        self.unfuse()
        for name in set(names) & self.strengths.keys():
            del self.strengths[name], self.sources[name], self._deltas[name]
            for layer in lora_layers(self.model):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # others become active, until apply
                    layer.delete_adapter(name)
            getattr(self.model, "peft_config", {}).pop(name, None)
        self.apply()
        if not self.strengths:
            _detach(self.model)
            self._originals.clear()

    def restore(self) -> None:
        """Set the scales of PEFT's layers again, which diffusers' attention_kwargs change."""
        if not self._unfused:
            self._set_scales(self._active())

    def apply(self) -> None:
        """Make the model compute with the present strengths."""
        active = self._active()
        self._set_scales(active)
        for parameter, original in self._originals.items():
            value = original.float()
            for name, strength in active.items():
                if parameter in self._deltas[name]:
                    value = value + strength * self._deltas[name][parameter].to(value)
            # In place, so that a compiled model stays compiled.
            self._parameter(parameter).data.copy_(value)

    def _active(self) -> dict[str, float]:
        return {n: s for n, s in self.strengths.items() if s and self.enabled}

    def _set_scales(self, active: Mapping[str, float]) -> None:
        """Give PEFT's layers the active adapters and their strengths."""
        if not self.strengths:
            return  # PEFT layers of other origin are left alone
        for layer in lora_layers(self.model):
            here = [name for name in active if name in layer.scaling]
            layer.enable_adapters(bool(here))
            if here:
                layer.set_adapter(here)
                for name in here:
                    layer.set_scale(name, active[name])

    def fuse(self, dequantize: bool = False) -> None:
        """Add the active adapters to the weights, so that they cost no time; the weights before are kept.

        Quantised layers are expanded if `dequantize`, refused otherwise.
        """
        self._refuse_fused()
        layers = [layer for layer in lora_layers(self.model) if not layer.disable_adapters]
        bases = [layer.get_base_layer() for layer in layers]
        ours = [base for base in bases if isinstance(base, QuantizedLinear)]
        others = [base for base in bases if base not in ours and type(base.weight) is not nn.Parameter]
        if others:
            kind = type(others[0].weight).__name__
            raise ValueError(f"{len(others)} of the layers are quantised ({kind}); leave the LoRA unfused")
        if ours and not dequantize:
            raise ValueError(
                f"{len(ours)} of the layers are quantised, and fusing needs their weights expanded; "
                "fuse_lora(dequantize=True) does that, or leave the LoRA unfused"
            )
        for layer in layers:
            inner = _innermost(layer)
            if inner not in self._unfused:
                before = inner.base_layer
                if isinstance(before, QuantizedLinear):
                    self._unfused[inner], inner.base_layer = before, before.expand()
                else:
                    # On the host: the copy is for unfusing, not for computing.
                    self._unfused[inner] = before.weight.data.to("cpu")
                    before.weight.data = before.weight.data.clone()
            layer.merge()

    def unfuse(self) -> None:
        """Restore the fused layers' weights bitwise."""
        for layer in lora_layers(self.model) if self._unfused else ():
            if layer.merged:
                layer.unmerge()
        for inner, before in self._unfused.items():
            if isinstance(before, nn.Module):
                inner.base_layer = before
            else:
                inner.base_layer.weight.data = before.to(inner.base_layer.weight.device)
        self._unfused.clear()

    def _refuse_fused(self) -> None:
        if self._unfused:
            raise ValueError("a LoRA is fused into the weights; call unfuse_lora() first")

    def _parameter(self, name: str) -> nn.Parameter:
        owner, attribute = self._owner(name)
        return getattr(owner, attribute)

    def _is_plain(self, name: str) -> bool:
        """Whether a parameter is one, and not what a quantised layer expands at each call."""
        owner, attribute = self._owner(name)
        return type(own_tensors(owner)[0].get(attribute)) is nn.Parameter

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        return (_innermost(module).base_layer if hasattr(module, "base_layer") else module), attribute


def adapters_of(model: Any) -> Adapters:
    """Return a transformer's adapters, which are kept on it from the first call."""
    model = uncompiled(model)
    if "adapters" not in vars(model):
        vars(model)["adapters"] = Adapters(model)
    return vars(model)["adapters"]


def has_adapters(model: Any) -> bool:
    """Return whether `adapters_of` was ever asked for a transformer."""
    return "adapters" in vars(uncompiled(model))


def lora_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's layers in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters, quantised ones too, by their names before any LoRA."""
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{path}.weight"] = (module.out_features, module.in_features)
    own = {name: shape for name, shape in found.items() if not re.search(r"\.(lora|lokr|hada)_", name)}
    return {name.replace(".base_layer", ""): shape for name, shape in own.items()}


def _innermost(layer: Any) -> Any:
    """Return the innermost of PEFT's nested layers, which holds the model's own."""
    while hasattr(layer.base_layer, "base_layer"):
        layer = layer.base_layer
    return layer


def _widen(layer: nn.Module) -> None:
    """Give a layer that computes in float32 such weights, so that what is added to them is not rounded."""
    layer = _innermost(layer).base_layer if hasattr(layer, "base_layer") else layer
    if isinstance(layer, Float32Linear):
        layer.to(at_least_float32(layer.weight.dtype))


def _attach(model: Any, lora: Lora, adapter: str) -> None:
    """Put PEFT's layers around the adapter's, and give them its matrices."""
    from peft import inject_adapter_in_model

    for kind in sorted({weights.kind for weights in lora.layers.values()}):
        layers = {name: weights for name, weights in lora.layers.items() if weights.kind == kind}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # several adapters are meant
            inject_adapter_in_model(_config(kind, layers), model, adapter)
        for name, weights in layers.items():
            _fill(model.get_submodule(name), adapter, weights)
    mark_peft_layers(model, True)
    reapply_group_offloading(model)  # so that the new layers are offloaded, too


def _config(kind: str, layers: Mapping[str, AdapterWeights]) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    ranks = {name: weights.rank for name, weights in layers.items()}
    options: dict[str, Any] = {"r": max(ranks.values()), "target_modules": list(ranks), "rank_pattern": ranks}
    if kind == "lokr":
        return LoKrConfig(**options)
    if kind == "loha":
        return LoHaConfig(**options)
    return LoraConfig(**options, use_dora=kind == "dora")


def _fill(layer: Any, adapter: str, weights: AdapterWeights) -> None:
    """Give one of PEFT's layers an adapter's matrices, in the dtype of the model's own weight."""
    base = layer.get_base_layer()
    device = (base.bias if isinstance(base, QuantizedLinear) else base.weight).device
    dtype = base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
    for name in layer.adapter_layer_names:  # PEFT guesses which parts there are
        parts = getattr(layer, name)
        if adapter in parts and name not in weights.parts:
            del parts[adapter]
    for name, tensor in weights.parts.items():
        parts = getattr(layer, name)
        weight = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
        if isinstance(parts, nn.ParameterDict):
            parts[adapter] = weight
        else:
            parts[adapter].weight = nn.Parameter(weight.flatten(), False) if "magnitude" in name else weight
    layer.r[adapter] = weights.rank
    (layer.lora_alpha if hasattr(layer, "lora_alpha") else layer.alpha)[adapter] = weights.scale_alpha


def _detach(model: Any) -> None:
    """Replace PEFT's layers by the model's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and ".base_layer" not in path:
            layer: Any = module
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    vars(model).pop("peft_config", None)
    mark_peft_layers(model, False)
    reapply_group_offloading(model)
