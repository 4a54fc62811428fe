"""Whole differences that adapters add to parameters: norms, biases, modulation, embeddings."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...private_apis import accelerate_hook, own_tensors


class Differences(nn.Module):
    """What adapters add to one module's parameters, with the protocol of PEFT's BaseTunerLayer.

    PEFT's and diffusers' methods switch, scale, merge and delete it like the layers with matrices. It has no
    parameters of its own and takes no part in the module's computation: it writes into the module's.
    """

    adapter_layer_names: tuple[str, ...] = ()
    base_layer = None

    def __init__(self, model: nn.Module, path: str, module: nn.Module) -> None:
        super().__init__()
        _register()
        self.path = path  # the module's in the model, without PEFT's layers
        self._module, self._model = (module,), (model,)  # in tuples, which do not make them parts of this one
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}  # by adapter and the parameter's name in the module
        self._originals: dict[str, Tensor] = {}
        self._merged: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.active_adapters: list[str] = []

    def add(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an adapter's differences, by the parameters' names in the module, at strength 1."""
        for name in tensors.keys() - self._originals.keys():
            # On the host: the copy is for the way back, not for computing.
            self._originals[name] = self._parameter(name).detach().to("cpu", copy=True)
        self.tensors[adapter] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.r[adapter] = self.lora_alpha[adapter] = 1
        self.scaling[adapter] = 1.0
        self._write()

    # ---- what PEFT and diffusers call ----

    @property
    def active_adapter(self) -> list[str]:
        """See BaseTunerLayer."""
        return self.active_adapters

    @property
    def merged(self) -> bool:
        """See BaseTunerLayer."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See BaseTunerLayer."""
        self.active_adapters = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._write()

    def enable_adapters(self, enabled: bool) -> None:
        """See BaseTunerLayer."""
        self.disable_adapters = not enabled
        if not enabled and self.merged:
            self.unmerge()
        self._write()

    def delete_adapter(self, adapter_name: str) -> None:
        """See BaseTunerLayer."""
        for held in (self.r, self.lora_alpha, self.scaling, self.tensors):
            held.pop(adapter_name, None)
        if adapter_name in self.active_adapters:
            self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
            self.active_adapters = self.active_adapters or sorted(self.scaling)[:1]
        self._write()

    def set_scale(self, adapter: str, scale: float) -> None:
        """See LoraLayer."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale
            self._write()

    def scale_layer(self, scale: float) -> None:
        """See LoraLayer; a ValueError in a call of a model whose weights a memory plan moves."""
        if scale != 1 and hasattr(accelerate_hook(self._model[0]), "prepare_edit"):
            raise ValueError(
                "attention_kwargs' scale cannot change a LoRA with whole differences while a memory plan "
                "moves the weights; give strengths to set_adapters instead"
            )
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] *= scale
        self._write()

    def unscale_layer(self, scale: float | None = None) -> None:
        """See LoraLayer."""
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
        self._write()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See BaseTunerLayer."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in [name for name in names if name in self.scaling and name not in self._merged]:
            if safe_merge and not all(torch.isfinite(tensor).all() for tensor in self.tensors[name].values()):
                raise ValueError(f"the adapter {name} has values that are not finite")
            self._merged[name] = self.scaling[name]
            self.merged_adapters.append(name)
        self._write()

    def unmerge(self) -> None:
        """See BaseTunerLayer."""
        self._merged.clear()
        self.merged_adapters.clear()
        self._write()

    def keep(self) -> None:
        """Take the parameters as they are now, with what is merged, for the model's own."""
        for name in self._originals:
            self._originals[name] = self._parameter(name).detach().to("cpu", copy=True)
        self._merged.clear()
        self.merged_adapters.clear()
        self._write()

    def get_base_layer(self) -> Any:
        """Restore the parameters but for what is merged, and return None: PEFT puts this in place of the
        layers that it takes out.
        """
        self.set_adapter([])

    # ---- the parameters ----

    def _write(self) -> None:
        """Give the parameters their values: merged adapters count alone, as in PEFT's other layers."""
        active = {name: self.scaling[name] for name in self.active_adapters if name in self.scaling}
        counted = self._merged or ({} if self.disable_adapters else active)
        for parameter, original in self._originals.items():
            target = self._parameter(parameter)
            if target.device.type != "cpu":
                edit_on_host(self._model[0])  # a copy on the device would be dropped
                target = self._parameter(parameter)
            value = original.float()
            for name, strength in counted.items():
                if (tensor := self.tensors.get(name, {}).get(parameter)) is not None:
                    value = value + float(strength) * tensor.to(value)
            target.data.copy_(value)  # in place, so that a compiled model stays compiled

    def _parameter(self, name: str) -> Tensor:
        parameter = own_tensors(self._module[0])[0][name]
        assert parameter is not None
        return parameter


def differences_of(model: nn.Module, path: str, module: nn.Module) -> Differences:
    """Return the layer of differences for one module of a model, which is made if there is none.

    It is a part of the module, but for those that PEFT's layers may stand around: what unloads these never
    looks inside. It is then a part of the module around that is no container, as a container runs its parts.
    """
    place, name = path, "differences"
    if isinstance(module, nn.Linear | nn.Conv3d):
        place, _, own = path.rpartition(".")
        while isinstance(model.get_submodule(place), nn.ModuleList | nn.Sequential):
            place, _, outer = place.rpartition(".")
            own = f"{outer}_{own}"
        name = f"{own}_differences"
    parent = model.get_submodule(place)
    if not hasattr(parent, name):
        parent.add_module(name, Differences(model, path, module))
    found = getattr(parent, name)
    assert isinstance(found, Differences)
    return found


@cache
def _register() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(Differences)


def edit_on_host(model: nn.Module) -> None:
    """Bring a model's weights to the host before they are edited, if a memory plan moves them."""
    prepare = getattr(accelerate_hook(model), "prepare_edit", None)
    if prepare is not None:
        prepare()
