"""Offloading of a pipeline's models: each is loaded when it is called, after others are offloaded.

Offloading copies nothing, because weights never change: it drops the copy on the device.
"""

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn

from ...devices import card, module_of
from ...host_memory import trim_heap
from ...private_apis import accelerate_hook, is_group_offloaded, uncompiled
from .devices import Device, HostDevice
from .layout import Placement, device_bytes, on_host
from .streaming import ModelStreamer
from .transfer import Loader


class ModelOffloader:
    """Keeps models where their placements say; on the device they take exactly `device_bytes`.

    After `offload_transient` only resident models are on the device. Code that edits weights (fuses a LoRA,
    casts a model) calls `offload_all` first. Models are given on the CPU; one that cannot be placed so, or
    that something else moves already, is refused.
    """

    def __init__(self, models: Mapping[str, tuple[nn.Module, Placement]], device: Device) -> None:
        self.device = device
        self.models = dict(models)
        self._loader, self._host_loader = Loader(device), Loader(HostDevice())
        self._streamers: dict[str, ModelStreamer] = {}
        self._hooks: dict[str, OffloadHook] = {}
        self._active: str | None = None  # the model that was called last
        seen: dict[int, str] = {}
        for name, (model, placement) in self.models.items():
            if id(model) in seen:
                raise ValueError(f"{seen[id(model)]} and {name} are one model; give it once")
            seen[id(model)] = name
            _check_free(name, model)
            if placement.kind == "host" and device.is_host:
                continue  # it runs where it is
            loader = self._loader
            if placement.kind == "host":
                placement, loader = on_host(model), self._host_loader
            self._streamers[name] = ModelStreamer(name, model, placement, loader.device, loader)

    @property
    def on_device(self) -> tuple[str, ...]:
        """Names of the models on the device."""
        return tuple(name for name, streamer in self._streamers.items() if streamer.on_device)

    @property
    def attached(self) -> bool:
        """Whether models are loaded when they are called."""
        return bool(self._hooks)

    def host_weights(self, name: str) -> list[torch.Tensor]:
        """Return a model's weights on the host, as far as they have been loaded."""
        return self._streamers[name].host_weights if name in self._streamers else []

    def attach(self) -> None:
        """Load models when they are called; ValueError if they are offloaded already."""
        for name, (model, _) in self.models.items():
            _check_free(name, model)
        for name, (model, _) in self.models.items():
            add_hook_to_module(model, OffloadHook(self, name, self._streamers.get(name)))

    def detach(self) -> None:
        """Leave the models on the CPU, as they were before."""
        for name, hook in list(self._hooks.items()):
            model, _ = self.models[name]
            if accelerate_hook(model) is not hook:  # another one took its place
                hook.detach_hook(model)
                continue
            remove_hook_from_module(model)
            if not hook.had_forward:
                vars(model).pop("forward", None)  # accelerate restores the class's forward as an attribute
        self._loader.close()
        self._host_loader.close()
        self.device.trim()

    def onload(self, name: str) -> None:
        """Load a model that is called, after offloading others; torch.OutOfMemoryError if it does not fit."""
        streamer = self._streamers.get(name)
        if streamer is None:
            return
        if streamer.failed:
            streamer.offload()
        if self._active != name or not streamer.on_device:
            self._offload(other for other in self._streamers if other != name)
            self._active = name
            if not streamer.on_device:
                self.device.trim()
                streamer.load()
        streamer.begin()

    def prefetch(self, name: str) -> bool:
        """Start to load the next model while another runs, if both fit and none streams; or return False."""
        if name not in self._hooks:  # diffusers may have removed them
            return False
        streamer = self._streamers.get(name)
        if streamer is None or streamer.on_device:
            return True
        busy = any(other.streams for other in self._streamers.values())
        if busy or device_bytes(*self.models[name]) > self.device.free_bytes():
            return False
        try:
            streamer.load()
        except torch.OutOfMemoryError:  # free memory is fragmented
            return False
        return True

    def offload_transient(self) -> None:
        """Offload all models but the resident ones."""
        self._active = None
        self._offload(self._streamers)
        self.device.trim()

    def offload_all(self) -> None:
        """Offload all models, so that their weights can be edited; replaced weights are no longer kept."""
        self._active = None
        for name in self._streamers.keys() & self._hooks.keys():
            self._streamers[name].refresh()
        self.device.trim()

    def _offload(self, names: Iterable[str]) -> None:
        for streamer in (self._streamers[name] for name in names):
            if streamer.placement.kind != "resident":
                streamer.offload()


class OffloadHook(ModelHook):
    """Loads a model when it is called, and tells diffusers where it runs."""

    def __init__(self, offloader: ModelOffloader, name: str, streamer: ModelStreamer | None) -> None:
        self.offloader, self.name, self.streamer = offloader, name, streamer
        # None for a model on the host: the first model with a device tells diffusers where a pipeline runs.
        on_device = streamer is not None and streamer.device is offloader.device
        self.execution_device = offloader.device.torch_device if on_device else None
        self.had_forward = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """See ModelHook."""
        self.had_forward = "forward" in vars(module)
        self.offloader._hooks[self.name] = self
        if self.streamer is not None:
            self.streamer.attach()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See ModelHook; methods of the VAE call this without arguments."""
        self.offloader.onload(self.name)
        device = self.execution_device or torch.device("cpu")
        return send_to_device(args, device), send_to_device(kwargs, device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """See ModelHook."""
        if self.streamer is not None:
            self.streamer.end()
        return output

    def prepare_edit(self) -> None:
        """Bring all models to the host before the weights of one are edited."""
        self.offloader.offload_all()

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """See ModelHook; diffusers, too, calls this when it removes a pipeline's hooks."""
        if self.streamer is not None:
            self.streamer.detach()
        self.offloader._hooks.pop(self.name, None)
        return module


def _check_free(name: str, model: nn.Module) -> None:
    if uncompiled(model) is not model:
        raise ValueError(f"{name} is compiled as a whole, hooks and all; compile its blocks instead")
    for module in model.modules():
        hook = accelerate_hook(module)
        if isinstance(hook, OffloadHook):
            raise ValueError(f"{name} is already offloaded, as {hook.name}; detach that offloader first")
        if hook is not None:
            kind = type(hook).__name__
            raise ValueError(f"{name} is offloaded by accelerate ({kind}); call remove_all_hooks() first")
    if is_group_offloaded(model):
        raise ValueError(f"{name} is offloaded in groups by diffusers; load it anew without")


_freed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def was_freed(model: nn.Module) -> bool:
    """Whether `free` has emptied a model."""
    return uncompiled(model) in _freed


def free(models: Iterable[nn.Module] = ()) -> None:
    """Give memory back to the system; `models` are emptied first, whoever holds them, and unusable after."""
    for model in models:
        model.to("meta")
        _freed.add(uncompiled(model))
    gc.collect()
    if (kind := card()) is not None:
        module_of(kind).empty_cache()
    trim_heap()
