"""diffusers' LoRA methods of a model: for any adapter name, undone to the bit, with files for ComfyUI."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.loaders import PeftAdapterMixin

from ...checks import cut, listed
from .adapters import Strength, adapters_of
from .casting import computing, store_as_computed
from .injecting import lora_layers, set_scaling
from .names import from_peft, to_peft
from .saving import save_as_diffusers, save_official, save_refusal


def scaled_by_attention_kwargs(forward: Callable[..., Any]) -> Any:
    """Let a call's attention_kwargs {"scale": s} multiply the strengths of LoRAs, for this call alone.

    s is a factor for all, or a table of factors by the names of adapters.
    """

    @wraps(forward)
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        scale = (kwargs.get("attention_kwargs") or {}).get("scale", 1.0)
        if scale == 1.0:
            return forward(self, *args, **kwargs)
        layers = list(lora_layers(self).values())
        before = [{name: float(scaling) for name, scaling in layer.scaling.items()} for layer in layers]
        try:
            for layer in layers:
                _scale(layer, scale)
            return forward(self, *args, **kwargs)
        finally:
            for layer, scalings in zip(layers, before, strict=True):
                for name, scaling in scalings.items():
                    set_scaling(layer, name, scaling)  # to the bit, and from 0, too
                layer.scale_layer(1.0)  # whole differences are written again

    return scaled


def _scale(layer: Any, scale: float | Mapping[str, float]) -> None:
    """Multiply the strengths of a layer's adapters."""
    if not isinstance(scale, Mapping):
        layer.scale_layer(scale)
        return
    for name, factor in scale.items():
        if (adapter := to_peft(name)) in layer.scaling:
            set_scaling(layer, adapter, float(layer.scaling[adapter]) * factor)
    layer.scale_layer(1.0)  # whole differences are written again


class LoraModel(PeftAdapterMixin):
    """What a transformer of ours has in place of diffusers' mixin; the methods have its signatures.

    Each works on what PEFT's layers hold, whichever method, of the model or of a pipeline, was called before.
    """

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """See PeftAdapterMixin."""
        # PEFT computes DoRA with the layers' weights and biases themselves.
        with self._injecting(adapter_name, expand=getattr(adapter_config, "use_dora", False)):
            super().add_adapter(adapter_config, to_peft(adapter_name))

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """See PeftAdapterMixin."""
        name = kwargs.get("adapter_name")
        options = kwargs | ({} if name is None else {"adapter_name": to_peft(name)})
        with self._injecting(name):
            super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix, hotswap, **options)

    @contextmanager
    def _injecting(self, name: str | None, expand: bool = False) -> Iterator[None]:
        with adapters_of(self).adding(name):
            modules: Any = self.modules()
            with computing(modules, expand):
                yield
            for layer in lora_layers(self).values() if expand else ():
                store_as_computed(layer.get_base_layer())
        if name is not None:
            adapters_of(self).forget_source(name)

    def save_lora_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str | None = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
        official_names: bool = False,
    ) -> None:
        """Save an adapter as diffusers does, or with the official names, which ComfyUI reads, too.

        Either way diffusers, wan22 and PEFT, with the configuration in the file's metadata, load the adapter
        as it is now at strength 1.

        Args:
            save_directory: folder, made if it is missing.
            adapter_name: default is "default", the name that `add_adapter` gives; None: the first one.
            upcast_before_saving: whether to write float32.
            safe_serialization: False: a .bin file of PyTorch's.
            weight_name: the file's name; default is diffusers', "pytorch_lora_weights.safetensors".
            official_names: whether keys are such as "diffusion_model.blocks.0.self_attn.q.lora_A.weight", and
                alpha / r is in the matrices; DoRA, LoKr, LoHa and whole differences are written, too.

        Raises:
            ValueError: there is no such adapter, or it has what diffusers' layout cannot hold.
        """
        names = adapters_of(self).names
        name = (names[0] if names else "default") if adapter_name is None else adapter_name
        if name not in names:
            # Scripts written for diffusers look for its message.
            there = listed(names) if names else "none"
            raise ValueError(f"Adapter name {cut(name)} not found in the model. There is {there}")
        if official_names:
            if not safe_serialization:
                raise ValueError("official_names=True writes safetensors; leave safe_serialization out")
            save_official(self, to_peft(name), Path(save_directory), weight_name, upcast_before_saving)
            return
        foreign = adapters_of(self).foreign(name)
        if refusal := save_refusal(self, to_peft(name), foreign):
            raise ValueError(f"the adapter {name} {refusal}; official_names=True writes it")
        folder = Path(save_directory)
        save_as_diffusers(self, to_peft(name), folder, weight_name, upcast_before_saving, safe_serialization)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        weights: Strength | Sequence[Strength | None] | None = None,
    ) -> None:
        """Choose the active adapters; all others are off.

        Args:
            adapter_names: the adapters to be active; names of none here are left out.
            weights: a strength for all, or a list with one for each; a strength is a number, or a table by
                beginnings of module names, such as {"blocks.0": 0.5}, 1 for all else. None: 1.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        many = isinstance(weights, Sequence)
        strengths: list[Any] = list(weights) if many else [weights] * len(names)  # type: ignore[arg-type]
        if len(strengths) != len(names):
            raise ValueError(f"{len(strengths)} strengths for {len(names)} adapters")
        here = adapters_of(self).names
        chosen = {n: 1.0 if s is None else s for n, s in zip(names, strengths, strict=True) if n in here}
        adapters_of(self).set(chosen)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """See PeftAdapterMixin."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        super().set_adapter([to_peft(name) for name in names])

    def active_adapters(self) -> list[str]:
        """See PeftAdapterMixin."""
        active = super().active_adapters()
        return [from_peft(name) for name in ([active] if isinstance(active, str) else active)]

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out; what is fused of them stays."""
        adapters_of(self).remove([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def enable_lora(self) -> None:
        """Compute with the active adapters again."""
        adapters_of(self).enable(True)

    def disable_lora(self) -> None:
        """Compute without adapters until `enable_lora`; fused ones are taken out first, to the bit."""
        adapters_of(self).enable(False)

    enable_adapters, disable_adapters = enable_lora, disable_lora

    def fuse_lora(
        self,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> None:
        """Add adapters to the weights; see the pipeline's method."""
        adapters_of(self).fuse(adapter_names, lora_scale, safe_fusing, dequantize)

    def unfuse_lora(self) -> None:
        """Restore the weights from before `fuse_lora`, to the bit; the adapters stay."""
        adapters_of(self).unfuse()

    def unload_lora(self) -> None:
        """Take all adapters out; what is fused stays in the weights."""
        adapters_of(self).unload()
