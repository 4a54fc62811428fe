"""Where each of a pipeline's models is: on the device, on the host, or there from call to call.

A offloader hangs on the models from outside: a model comes when it is called, and what may not stay leaves
first. Leaving copies nothing, because weights never change: it drops the copy on the device.
"""

import ctypes
import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn

from ...private_apis import accelerate_hook, is_group_offloaded, uncompiled
from .devices import Device
from .layout import Placement
from .streaming import ModelStreamer
from .transfer import CHUNK_BYTES, Loader


class ModelOffloader:
    """Keeps models where their placements say, and to the byte on the device what `device_bytes` says.

    After `offload_transient` only resident models are on the device. Code that edits weights (fuses a LoRA,
    casts a model) calls `offload_all` first.

    Args:
        models: by name, each with its placement; all on the CPU.
        device: where they run.
        chunk_bytes: size of each part of the small pinned buffer that mapped weights pass through.

    Raises:
        ValueError: a model cannot be placed so, or is already managed by somebody.
    """

    def __init__(
        self,
        models: Mapping[str, tuple[nn.Module, Placement]],
        device: Device,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.device = device
        self.models = dict(models)
        self._loader = Loader(device, chunk_bytes)
        self._stays: dict[str, ModelStreamer] = {}
        self._turns: dict[str, OffloadHook] = {}
        self._active: str | None = None  # that was called last
        seen: dict[int, str] = {}
        for name, (model, placement) in self.models.items():
            if id(model) in seen:
                raise ValueError(f"{seen[id(model)]} and {name} are one model; give it once")
            seen[id(model)] = name
            _check_free(name, model)
            if placement.kind != "host":
                self._stays[name] = ModelStreamer(name, model, placement, device, self._loader)

    @property
    def on_device(self) -> tuple[str, ...]:
        """The names of the models that are on the device."""
        return tuple(name for name, stay in self._stays.items() if stay.on_device)

    @property
    def attached(self) -> bool:
        """Whether models come when they are called."""
        return bool(self._turns)

    def host_weights(self, name: str) -> list[torch.Tensor]:
        """Return the weights of a model on the host, as far as it has been on the device."""
        return self._stays[name].host_weights if name in self._stays else []

    def attach(self) -> None:
        """Let models come when they are called.

        Raises:
            ValueError: this offloader is attached, or a model has been given another owner.
        """
        for name, (model, _) in self.models.items():
            _check_free(name, model)
        for name, (model, _) in self.models.items():
            add_hook_to_module(model, OffloadHook(self, name, self._stays.get(name)))

    def detach(self) -> None:
        """Let models be as they were before, on the CPU."""
        for name, turn in list(self._turns.items()):
            model, _ = self.models[name]
            if accelerate_hook(model) is not turn:  # somebody put another in its place
                turn.detach_hook(model)
                continue
            remove_hook_from_module(model)
            if not turn.had_forward:
                vars(model).pop("forward", None)  # accelerate leaves a bound method in the place of its own
        self._loader.close()
        self.device.trim()

    def enter(self, name: str) -> None:
        """Bring a model to the device, after those that leave for it.

        Args:
            name: of the model; nothing happens for one that runs on the host.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        stay = self._stays.get(name)
        if stay is None:
            return
        if self._active != name or not stay.on_device:
            self._leave(other for other in self._stays if other != name)
            self._active = name
            if not stay.on_device:
                self.device.trim()
                stay.arrive()
        stay.begin()

    def prefetch(self, name: str) -> bool:
        """Start to bring a model to the device while another one runs, if that costs the other nothing.

        It costs something where there is no room for both, or where the other one's blocks need the way.

        Args:
            name: of the model that comes next.

        Returns: whether it is on its way, or there.
        """
        if name not in self._turns:  # diffusers may have taken the hooks away
            return False
        stay = self._stays.get(name)
        if stay is None or stay.on_device:
            return True
        busy = any(other.streams for other in self._stays.values())
        if busy or stay.nbytes > self.device.free_bytes():
            return False
        try:
            stay.arrive()
        except torch.OutOfMemoryError:  # there is room, but not in one piece
            return False
        return True

    def offload_transient(self) -> None:
        """Let all models but the resident ones leave."""
        self._active = None
        self._leave(self._stays)
        self.device.trim()

    def offload_all(self) -> None:
        """Let all models leave, so that their weights can be edited; what becomes of them comes next.

        Afterwards, it lets go of those that were replaced.
        """
        self._active = None
        for name in self._stays.keys() & self._turns.keys():
            self._stays[name].offload_all()
        self.device.trim()

    def _leave(self, names: Iterable[str]) -> None:
        for stay in (self._stays[name] for name in names):
            if stay.placement.kind != "resident":
                stay.leave()


class OffloadHook(ModelHook):
    """Lets a model come when it is called; what diffusers asks for where a model runs."""

    def __init__(self, offloader: ModelOffloader, name: str, stay: ModelStreamer | None) -> None:
        self.offloader, self.name, self.stay = offloader, name, stay
        # A model on the host does not say where it runs: diffusers takes the first model that does for where
        # the pipeline runs, and the host for where this one is.
        self.execution_device = None if stay is None else offloader.device.torch_device
        self.had_forward = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """See ModelHook."""
        self.had_forward = "forward" in vars(module)
        self.offloader._turns[self.name] = self
        if self.stay is not None:
            self.stay.install()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See ModelHook; methods of the VAE call this without arguments."""
        self.offloader.enter(self.name)
        device = self.execution_device or torch.device("cpu")
        return send_to_device(args, device), send_to_device(kwargs, device)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """See ModelHook; diffusers calls this, too, when it takes the hooks from a pipeline."""
        if self.stay is not None:
            self.stay.remove()
        self.offloader._turns.pop(self.name, None)
        return module


def _check_free(name: str, model: nn.Module) -> None:
    """Refuse a model whose weights somebody else moves.

    Raises:
        ValueError: with the one who does, and what to call.
    """
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


def free(models: Iterable[nn.Module] = ()) -> None:
    """Give memory back to the system.

    Args:
        models: to be emptied first, so that their weights are gone whoever still holds the models; they are
            not usable after.
    """
    for model in models:
        model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library, which has no such function
        return
    trim(0)
