"""Add adapters to a transformer's weights, and restore the weights to the bit."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...host_memory import check_room
from ...private_apis import layerwise_casting, own_tensors
from ..deferred import settle
from ..quantized_linear import QuantizedLinear
from .casting import is_narrow
from .differences import Differences
from .injecting import full_scale, innermost


class Fused:
    """The fused layers of one transformer: their weights from before, and the strengths of what is fused."""

    def __init__(self) -> None:
        self.strengths: dict[Any, dict[str, float]] = {}  # by PEFT's layer and adapter
        self._before: dict[Any, Mapping[str, Tensor] | nn.Module] = {}  # by PEFT's innermost layer

    def fuse(
        self, chosen: Mapping[Any, Mapping[str, float]], safe: bool = False, dequantize: bool = False
    ) -> list[Any]:
        """Merge adapters, given by PEFT's layers, at these strengths; return the layers that had none.

        Raises:
            ValueError: layers are quantised, or cast from a narrower dtype, and dequantize is False; or
                `safe`, and a merged weight is not finite. Nothing is merged then.
            MemoryError: the host has no room for the merged weights, which are in no file.
        """
        self._forget_unmerged()
        matrices = [layer for layer in chosen if not isinstance(layer, Differences)]
        weights = [
            weight for layer in matrices for weight in layer.get_base_layer().parameters(recurse=False)
        ]
        nbytes = sum(weight.nbytes for weight in weights if weight.device.type == "cpu")
        check_room(nbytes, "fusing", "a loaded LoRA need not be fused")
        for layer in chosen:
            settle(layer)
        _refuse_narrow([layer.get_base_layer() for layer in matrices], dequantize)
        first = [layer for layer in chosen if not layer.merged]
        try:
            for layer in matrices:
                if layer in self.strengths or not layer.merged:  # else PEFT has merged it, and subtracts
                    self._keep(innermost(layer))
            for layer, strengths in chosen.items():
                self._merge(layer, strengths, safe)
        except ValueError:
            self.unfuse(first)
            raise
        return first

    def unfuse(self, layers: Iterable[Any]) -> None:
        """Restore the weights of PEFT's layers to the bit; what PEFT itself merged is subtracted."""
        layers = list(layers)
        differences = [layer for layer in layers if isinstance(layer, Differences)]
        for layer in [layer for layer in layers if layer not in differences and layer.merged]:
            layer.unmerge()
        self._forget_unmerged()
        for layer in differences:  # last, as they write into what was just restored
            layer.unmerge()
            self.strengths.pop(layer, None)

    def keep(self, merged: Mapping[Any, Mapping[str, float]], names: Collection[str]) -> None:
        """Keep adapters in the weights for good; the others that are merged can still be taken out.

        `merged`: all of PEFT's layers in which adapters are merged, with the strengths of these.
        """
        self.unfuse(merged)
        kept, others = (
            {
                layer: chosen
                for layer, strengths in merged.items()
                if (chosen := {name: s for name, s in strengths.items() if (name in names) is wanted})
            }
            for wanted in (True, False)
        )
        self.fuse(kept, dequantize=True)
        self.forget()
        for layer in kept:
            if isinstance(layer, Differences):
                layer.keep()
            else:
                layer.merged_adapters.clear()
        self.fuse(others, dequantize=True)

    def forget(self) -> None:
        """Keep the weights as they are now: those from before are given up."""
        self.strengths.clear()
        self._before.clear()

    def kept(self) -> list[Any]:
        """Return what is kept of the weights from before."""
        return [
            tensor
            for before in self._before.values()
            for tensor in (before.parameters() if isinstance(before, nn.Module) else before.values())
        ]

    def _keep(self, inner: Any) -> None:
        """Keep a layer's weights; one that is stored narrowly is replaced by an ordinary layer."""
        if inner in self._before:
            return
        base = inner.base_layer
        if (wide := _expanded(base)) is not base:
            self._before[inner], inner.base_layer = base, wide
            return
        parameters = {name: tensor for name, tensor in own_tensors(base)[0].items() if tensor is not None}
        # On the host: the copy is for unfusing, not for computing.
        self._before[inner] = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}

    def _merge(self, layer: Any, strengths: Mapping[str, float], safe: bool) -> None:
        base = None if isinstance(layer, Differences) else layer.get_base_layer()
        live = None if base is None else base.weight.data  # PEFT may put another tensor in its place
        for name, strength in strengths.items():
            scaling = layer.scaling[name]
            layer.scaling[name] = strength * full_scale(layer, name)
            try:
                layer.merge(safe_merge=safe, adapter_names=[name])
            finally:
                layer.scaling[name] = scaling
            self.strengths.setdefault(layer, {})[name] = strength
        if base is not None and live is not None and base.weight.data_ptr() != live.data_ptr():
            # In place, for a compiled model and whatever else holds the weight, such as an offload.
            base.weight.data = live.copy_(base.weight.data)

    def _forget_unmerged(self) -> None:
        """Restore the weights of layers in which nothing is merged any more, and give up what was kept."""
        merged = {
            innermost(layer) for layer in self.strengths if layer.merged and layer.base_layer is not None
        }
        self.strengths = {layer: s for layer, s in self.strengths.items() if layer.merged}
        for inner in self._before.keys() - merged:
            before = self._before.pop(inner)
            if isinstance(before, nn.Module):
                inner.base_layer = before
            else:
                for name, tensor in before.items():
                    inner.base_layer.get_parameter(name).data.copy_(tensor)


def _refuse_narrow(layers: list[Any], dequantize: bool) -> None:
    ours = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    others = [layer for layer in layers if layer not in ours and type(layer.weight) is not nn.Parameter]
    if others:
        kind = type(others[0].weight).__name__
        raise ValueError(f"{len(others)} of the layers are quantised ({kind}); leave the LoRA unfused")
    cast = [layer for layer in layers if is_narrow(layer)]
    for found, what in ((ours, "quantised"), (cast, "stored in a narrow dtype by layerwise casting")):
        if found and not dequantize:
            raise ValueError(
                f"{len(found)} of the layers are {what}, and fusing needs their weights expanded; "
                "fuse_lora(dequantize=True) does that, or leave the LoRA unfused"
            )


def _expanded(layer: Any) -> Any:
    """Return an ordinary layer for one that is quantised or cast, with the weight it computes with."""
    if isinstance(layer, QuantizedLinear):
        return layer.expand()
    if not is_narrow(layer):
        return layer  # the very one that whole differences are written into
    casting = layerwise_casting(layer)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        value = parameter.detach().to(casting.compute_dtype, copy=True)
        setattr(linear, name, nn.Parameter(value, requires_grad=False))
    return linear
