"""LoRAs in one transformer: PEFT's layers around its own, and differences added to its parameters."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .lora import Lora
from .quantized import QuantizedLinear


class Adapters:
    """The LoRAs of one transformer.

    Args:
        model: the transformer.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes = _shapes(model)
        self.strengths: dict[str, float] = {}  # of every loaded adapter; 0: not active
        self.enabled = True
        self._deltas: dict[str, dict[str, torch.Tensor]] = {}  # by adapter and parameter
        self._originals: dict[str, torch.Tensor] = {}  # of the parameters that differences are added to
        self._unfused: dict[
            Any, torch.Tensor | QuantizedLinear
        ] = {}  # of fused layers, what was there before

    def load(self, name: str, lora: Lora, strength: float) -> None:
        """Add an adapter.

        Args:
            name: of the adapter.
            lora: what it changes; its tensors are copied.
            strength: what its changes are multiplied by.
        """
        self._refuse_fused()
        if lora.pairs:
            _attach(self.model, lora, name)
        for parameter in lora.deltas.keys() - self._originals.keys():
            self._originals[parameter] = self._parameter(parameter).detach().clone()
        self._deltas[name] = {parameter: delta.clone() for parameter, delta in lora.deltas.items()}
        self.strengths[name] = strength
        self.apply()

    def set(self, strengths: Mapping[str, float]) -> None:
        """Give adapters their strengths; those that are not named are not active."""
        self._refuse_fused()
        self.strengths = {name: strengths.get(name, 0.0) for name in self.strengths}
        self.apply()

    def remove(self, names: Iterable[str]) -> None:
        """Take adapters out, without a trace once the last one is gone."""
        self.unfuse()
        for name in set(names) & self.strengths.keys():
            del self.strengths[name], self._deltas[name]
            for layer in lora_layers(self.model):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that others become active: see apply
                    layer.delete_adapter(name)
            getattr(self.model, "peft_config", {}).pop(name, None)
        self.apply()
        if not self.strengths:
            _detach(self.model)
            self._originals.clear()

    def apply(self) -> None:
        """Make the model compute with the strengths as they are now."""
        active = {n: s for n, s in self.strengths.items() if s and self.enabled}
        for layer in lora_layers(self.model):
            here = [name for name in active if name in layer.scaling]
            layer.enable_adapters(bool(here))
            if here:
                layer.set_adapter(here)
                for name in here:
                    layer.set_scale(name, active[name])
        for parameter, original in self._originals.items():
            value = original.float()
            for name, strength in active.items():
                if parameter in self._deltas[name]:
                    value = value + strength * self._deltas[name][parameter].to(value)
            # In place, so that a compiled model stays compiled.
            self._parameter(parameter).data.copy_(value)

    def fuse(self, dequantize: bool = False) -> None:
        """Add the active adapters to the weights, so that they cost no time; the weights before are kept.

        Args:
            dequantize: whether to expand the quantised layers among them for it.

        Raises:
            ValueError: a layer is quantised.
        """
        self._refuse_fused()
        layers = [layer for layer in lora_layers(self.model) if not layer.disable_adapters]
        quantized = [layer for layer in layers if isinstance(layer.base_layer, QuantizedLinear)]
        if quantized and not dequantize:
            raise ValueError(
                f"{len(quantized)} of the layers are quantised, and fusing needs their weights expanded; "
                "fuse_lora(dequantize=True) does that, or leave the LoRA unfused"
            )
        for layer in layers:
            before = layer.base_layer
            if isinstance(before, QuantizedLinear):
                layer.base_layer = before.expand()
                self._unfused[layer] = before
            else:
                # On the host: the copy is for unfusing, not for computing.
                self._unfused[layer] = before.weight.data.to("cpu")
                before.weight.data = before.weight.data.clone()
            layer.merge()

    def unfuse(self) -> None:
        """Give fused layers the weights back that they had, to the bit."""
        for layer, before in self._unfused.items():
            layer.unmerge()
            if isinstance(before, nn.Module):
                layer.base_layer = before
            else:
                layer.base_layer.weight.data = before.to(layer.base_layer.weight.device)
        self._unfused.clear()

    def _refuse_fused(self) -> None:
        if self._unfused:
            raise ValueError("a LoRA is fused into the weights; call unfuse_lora() first")

    def _parameter(self, name: str) -> nn.Parameter:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        return getattr(getattr(module, "base_layer", module), attribute)


def adapters_of(model: Any) -> Adapters:
    """Return a transformer's adapters: those that it has, or an empty set that is now its own."""
    if "adapters" not in vars(model):
        vars(model)["adapters"] = Adapters(model)
    return vars(model)["adapters"]


def lora_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's layers in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters, also of the quantised ones, by the names before any LoRA."""
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{path}.weight"] = (module.out_features, module.in_features)
    return {name.replace(".base_layer.", "."): shape for name, shape in found.items() if ".lora_" not in name}


def _attach(model: Any, lora: Lora, adapter: str) -> None:
    """Put PEFT's layers around those that a LoRA changes, and give them its matrices."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {name: pair.down.shape[0] for name, pair in lora.pairs.items()}
    config = LoraConfig(r=max(ranks.values()), target_modules=list(ranks), rank_pattern=ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there will be several adapters, which is meant
        inject_adapter_in_model(config, model, adapter)
    model._hf_peft_config_loaded = True  # what the model's methods in diffusers ask for
    for name, pair in lora.pairs.items():
        layer = model.get_submodule(name)
        base = layer.base_layer
        kept = base.bias if isinstance(base, QuantizedLinear) else base.weight
        for side, matrix in ((layer.lora_A, pair.down), (layer.lora_B, pair.up)):
            side[adapter].weight = nn.Parameter(matrix.to(kept.device, kept.dtype, copy=True), False)
        layer.lora_alpha[adapter] = ranks[name] if pair.alpha is None else pair.alpha


def _detach(model: Any) -> None:
    """Put the model's own layers back in the place of PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.base_layer)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
