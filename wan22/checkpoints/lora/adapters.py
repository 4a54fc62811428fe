"""The adapters of one transformer: their names, strengths and files, read from PEFT's layers each time."""

import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...checks import listed, shown
from ...private_apis import own_tensors, uncompiled
from ..quantized_linear import QuantizedLinear
from .differences import edit_on_host
from .fusing import Fused
from .injecting import detach, full_scale, inject, lora_layers, own_layer, path_of, replace, set_scaling
from .names import from_peft, to_peft
from .scales import check_strength
from .weights import Lora

logger = logging.getLogger(__name__)

# The factor of an adapter's weights: one, or one for each module by the (beginning of the) names of modules.
Strength = float | Mapping[str, float]


class Adapters:
    """A view of a transformer's adapters, ours or diffusers', compiled or not.

    Names, strengths and which adapters are active are read from PEFT's layers each time, as PEFT's and
    diffusers' own methods may change them. Kept here are the adapters' files, and what is fused.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # The files of adapters with their fingerprints, and PEFT's configurations that were made for them:
        # another one is another's.
        self._sources: dict[str, tuple[tuple[str, str], Any]] = {}
        self._into_both: set[str] = set()  # adapters that a call which named no expert loaded into both
        self._fused = Fused()
        # Name, file with its fingerprint, and strength of what was fused and unloaded since.
        self._fused_for_good: list[tuple[str, tuple[str | None, str], Strength]] = []

    # ---- what there is ----

    @property
    def names(self) -> list[str]:
        """The loaded adapters."""
        return [from_peft(name) for name in getattr(self.model, "peft_config", {})]

    @property
    def active(self) -> list[str]:
        """The adapters that are chosen, even if adapters are disabled."""
        chosen = {name: None for layer in self._layers.values() for name in layer.active_adapters}
        return [name for name in map(from_peft, chosen) if name in self.names]

    @property
    def fused(self) -> set[str]:
        """The adapters that are fused into weights, and still loaded."""
        return {from_peft(name) for layer in self._layers.values() for name in layer.merged_adapters}

    @property
    def in_weights(self) -> set[str]:
        """The adapters that are fused into weights, still loaded or not."""
        return self.fused | {name for name, _, _ in self._fused_for_good}

    @property
    def unfused(self) -> list[str]:
        """The adapters that change the result now without being fused into the weights."""
        layers = [layer for layer in self._layers.values() if not layer.merged]
        found = {n: None for layer in layers for n, strength in self._in_effect(layer).items() if strength}
        return [from_peft(name) for name in found]

    @property
    def into_both(self) -> list[str]:
        """The loaded adapters that a call which named no expert loaded into both."""
        return [name for name in self.names if name in self._into_both]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's parameters, quantised ones too, by their names without any LoRA."""
        return _shapes(self.model)

    def strengths(self) -> dict[str, Strength]:
        """Return the adapters that change the result now, with their strengths."""
        return {name: strength for name, (_, strength) in self.used().items()}

    def used(self) -> dict[str, tuple[str | None, Strength]]:
        """Return the file and strength of the adapters that change the result now; those that were fused and
        unloaded come first, and a name that comes again gets a number.

        The file is "" for tensors in memory, None if PEFT or diffusers has made the adapter.
        """
        return {name: (source, strength) for name, ((source, _), strength) in self._used().items()}

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints that the files of `used` adapters had when they were read, if known."""
        return {name: mark for name, ((_, mark), _) in self._used().items() if mark}

    def foreign(self, name: str) -> bool:
        """Whether PEFT or diffusers has made an adapter."""
        return self._source(name)[0] is None

    # ---- what changes it ----

    def load(self, name: str, lora: Lora, strength: Strength, into_both: bool = False) -> None:
        """Copy an adapter into the model and activate it; the active ones stay active.

        `into_both`: it goes into both experts because the call named none.

        Whole differences of quantised weights are refused, and any LoRA where weights are absent.
        """
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError(
                "weights are offloaded one by one; load LoRAs before enable_sequential_cpu_offload"
            )
        if quantized := [parameter for parameter in lora.deltas if not self._is_plain(parameter)]:
            raise ValueError(
                f"the LoRA has whole differences of {listed(quantized)}, which are quantised; load the "
                "model with dequantize=True, or call wan22.accel.quantize.dequantize"
            )
        if lora.changes_nothing:
            logger.warning("the LoRA %s changes nothing: its matrices' products are all zero", name)
        disabled = self._disabled
        self.unfuse_at_strengths(f"{name} counts beside it")
        active = self.active
        # As in diffusers, those that its own methods added are not active any more.
        if others := [other for other in active if self.foreign(other)]:
            logger.warning("%s is not active beside %s; set_adapters makes both so", ", ".join(others), name)
        edit_on_host(self.model)
        inject(self.model, lora, to_peft(name))
        self._remember(name, lora)
        if into_both:
            self._into_both.add(name)
        self._choose([*(other for other in active if other not in others), name])
        self._scale(name, strength)
        self._enable(not disabled)

    @contextmanager
    def adding(self, name: str | None) -> Iterator[None]:
        """Let diffusers add an adapter within this context.

        It is then the only active one, as in diffusers; but adapters that were fused are unfused first and
        stay active, and while adapters are disabled, the new one is disabled, too.
        """
        known, disabled = self.names, self._disabled
        kept = self.active if self.unfuse_at_strengths(f"{name or 'the new one'} counts beside it") else []
        yield
        if kept:
            self._choose([*kept, *(new for new in self.names if new not in known)])
        self._enable(not disabled)

    def swap(self, name: str, lora: Lora, strength: Strength) -> None:
        """Give an adapter other weights in place; see `injecting.replace`."""
        if name not in self.names:
            raise ValueError(
                f"hotswap=True: there is no adapter {shown(name)}; there is {listed(self.names)}"
            )
        edit_on_host(self.model)
        replace(self.model, lora, to_peft(name))
        self._remember(name, lora)
        self._scale(name, strength)

    def set(self, strengths: Mapping[str, Strength]) -> None:
        """Choose the active adapters and their strengths; the others are not active."""
        edit_on_host(self.model)
        self._choose(list(strengths))
        for name, strength in strengths.items():
            self._scale(name, strength)

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off; their strengths are kept, and what is fused is taken out first."""
        edit_on_host(self.model)
        if not enabled:
            self.unfuse()
        self._enable(enabled)

    def remove(self, names: Iterable[str]) -> None:
        """Remove adapters; without the last one, the model has its own layers again.

        What is fused of them stays in the weights. If no active one is left, another one becomes active.
        """
        gone, before = [name for name in names if name in self.names], self.active
        if gone and set(gone) == set(self.names):
            return self.unload()
        edit_on_host(self.model)
        self._keep_fused(gone)
        for name in gone:
            for layer in self._layers.values():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # one for each layer
                    layer.delete_adapter(to_peft(name))
            self.model.peft_config.pop(to_peft(name), None)
            self.forget_source(name)
        if new := [name for name in self.active if name not in before]:
            self._choose(new[:1])  # PEFT chooses in each layer that had the active one, and there alone
            logger.warning("%s is active now, as no active adapter was left", new[0])

    def unload(self) -> None:
        """Take all adapters out; what is fused stays in the weights."""
        self._note_fused_for_good(self.fused)
        edit_on_host(self.model)
        detach(self.model)
        self._fused.forget()
        self._sources.clear()
        self._into_both.clear()

    def fuse(
        self,
        names: Sequence[str] | None = None,
        scale: float = 1.0,
        safe: bool = False,
        dequantize: bool = False,
    ) -> list[Any]:
        """Add adapters to the weights, the active ones by default, so that they cost no time.

        The weights from before are kept on the host. Return the layers that had nothing fused. `Fused.fuse`
        tells the errors.
        """
        wanted = None if names is None else [to_peft(name) for name in names]
        chosen = {}
        for layer in self._layers.values():
            here = [
                name
                for name in (layer.active_adapters if wanted is None else wanted)
                if name in layer.scaling and name not in layer.merged_adapters
            ]
            if here and not layer.disable_adapters:
                chosen[layer] = {name: _strength(layer, name) * scale for name in here}
        self._warn_of_uncounted(chosen)
        edit_on_host(self.model)
        return self._fused.fuse(chosen, safe, dequantize)

    def unfuse(self, layers: Iterable[Any] | None = None) -> None:
        """Restore the fused layers' weights to the bit; the adapters stay, active as they were."""
        edit_on_host(self.model)
        self._fused.unfuse(self._layers.values() if layers is None else layers)

    def unfuse_at_strengths(self, reason: str) -> bool:
        """Unfuse, and set the strengths that counted until now, those of fuse_lora included.

        Returns: whether any adapter was fused.
        """
        if not (fused := sorted(self.fused)):
            return False
        counted = {
            n: t for n, t in self._tables().items() if n in fused or (n in self.names and any(t.values()))
        }
        self.unfuse()
        self._choose(list(counted))
        for name, table in counted.items():
            self._scale(name, table)
        logger.info("%s is not fused any more, so that %s", ", ".join(fused), reason)
        return True

    @contextmanager
    def merged(self, names: Sequence[str]) -> Iterator[None]:
        """Have adapters fused for a while, quantised layers expanded; then restore the weights to the bit."""
        layers = self.fuse(names, dequantize=True)
        try:
            yield
        finally:
            self.unfuse(layers)

    def fused_weights(self) -> list[torch.Tensor]:
        """Return what is kept on the host of the weights from before fusing."""
        return self._fused.kept()

    def move(self, names: Iterable[str], device: Any) -> None:
        """Move adapters' matrices to a device, whatever kind they are of."""
        for layer in self._layers.values():
            for parts in (getattr(layer, part) for part in layer.adapter_layer_names):
                for name in {to_peft(name) for name in names} & set(parts.keys()):
                    if isinstance(parts[name], nn.Module):
                        parts[name].to(device)
                    else:
                        parts[name].data = parts[name].data.to(device)

    def forget_source(self, name: str) -> None:
        """Forget the file of an adapter that is replaced or deleted."""
        self._sources.pop(name, None)
        self._into_both.discard(name)

    # ---- PEFT's layers ----

    @property
    def _layers(self) -> dict[str, Any]:
        return lora_layers(self.model)

    @property
    def _disabled(self) -> bool:
        return any(layer.disable_adapters for layer in self._layers.values())

    def _counted(self) -> dict[str, Strength]:
        """Return the strengths that PEFT's layers compute with, one for all modules or a table of them."""
        return {name: _one(table) for name, table in self._tables().items() if any(table.values())}

    def _tables(self) -> dict[str, dict[str, float]]:
        """Return each adapter's strength in each of its modules; 0 where it does not count."""
        found: dict[str, dict[str, float]] = {}
        for path, layer in self._layers.items():
            counted = self._in_effect(layer)
            for name in {**dict.fromkeys(layer.scaling, 0.0), **counted}:
                found.setdefault(from_peft(name), {})[path_of(path, layer)] = counted.get(name, 0.0)
        return found

    def _in_effect(self, layer: Any) -> dict[str, float]:
        """Return the strengths that a layer computes with: of merged adapters alone, if there are any."""
        if layer.merged:
            by_peft = [name for name in layer.merged_adapters if name in layer.scaling]
            return self._fused.strengths.get(layer) or {name: _strength(layer, name) for name in by_peft}
        if layer.disable_adapters:
            return {}
        return {name: _strength(layer, name) for name in layer.active_adapters if name in layer.scaling}

    def _warn_of_uncounted(self, chosen: Mapping[Any, Mapping[str, float]]) -> None:
        """Warn of adapters that will not count, as PEFT's layers compute with what is merged alone."""
        left = {
            from_peft(name): None
            for layer, names in chosen.items()
            for name, strength in self._in_effect(layer).items()
            if strength and name not in names and name not in layer.merged_adapters
        }
        if left:
            logger.warning(
                "%s does not count where another adapter is fused, until unfuse_lora; fuse them together",
                ", ".join(left),
            )

    def _keep_fused(self, names: Sequence[str]) -> None:
        """Keep what is fused of adapters in the weights for good, though others can still be taken out."""
        if not (fused := self.fused & set(names)):
            return
        self._note_fused_for_good(fused)
        merged = {layer: self._in_effect(layer) for layer in self._layers.values() if layer.merged}
        self._fused.keep(merged, {to_peft(name) for name in fused})

    def _note_fused_for_good(self, names: Collection[str]) -> None:
        """Note fused adapters that are unloaded and stay in the weights."""
        if names:
            logger.info("%s stays fused in the weights", ", ".join(sorted(names)))
        now = [(name, strength) for name, strength in self._counted().items() if name in names]
        self._fused_for_good += [(name, self._source(name), strength) for name, strength in now]

    def _remember(self, name: str, lora: Lora) -> None:
        self._sources[name] = (lora.source, lora.fingerprint), self.model.peft_config[to_peft(name)]

    def _source(self, name: str) -> tuple[str | None, str]:
        """Return an adapter's file and its fingerprint."""
        source, config = self._sources.get(name, ((None, ""), None))
        known = getattr(self.model, "peft_config", {}).get(to_peft(name))
        return source if config is known else (None, "")

    def _used(self) -> dict[str, tuple[tuple[str | None, str], Strength]]:
        """Return file, fingerprint and strength of the adapters that change the result; see `used`."""
        found: dict[str, tuple[tuple[str | None, str], Strength]] = {}
        loaded = [(name, self._source(name), strength) for name, strength in self._counted().items()]
        for name, source, strength in (*self._fused_for_good, *loaded):
            numbered = (f"{name} ({i})" for i in range(2, len(found) + 3))
            found[next(key for key in (name, *numbered) if key not in found)] = source, strength
        return found

    def _enable(self, enabled: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(enabled)

    def _choose(self, names: Sequence[str]) -> None:
        chosen = [to_peft(name) for name in names]
        for layer in self._layers.values():
            layer.set_adapter(chosen)

    def _scale(self, name: str, strength: Strength) -> None:
        """Set an adapter's strength; a table's names must each be of a module that it has."""
        key, used = to_peft(name), set()
        for path, layer in self._layers.items():
            if key in layer.scaling:
                entry, factor = _lookup(strength, path_of(path, layer))
                used.add(entry)
                set_scaling(layer, key, factor * full_scale(layer, key))
                layer.scale_layer(1.0)  # whole differences are written anew
        if isinstance(strength, Mapping) and (unused := sorted(strength.keys() - used)):
            logger.warning("strengths of %s: the adapter %s has no such modules", listed(unused), name)

    def _is_plain(self, name: str) -> bool:
        """Whether a parameter is one, and not what a quantised layer expands at each call."""
        path, _, attribute = name.rpartition(".")
        return type(own_tensors(own_layer(self.model, path))[0].get(attribute)) is nn.Parameter


def adapters_of(model: Any) -> Adapters:
    """Return a transformer's adapters; what is kept of them is kept on it."""
    model = uncompiled(model)
    if "adapters" not in vars(model):
        vars(model)["adapters"] = Adapters(model)
    adapters: Adapters = vars(model)["adapters"]
    return adapters


def _strength(layer: Any, name: str) -> float:
    """Return an adapter's strength in one layer: PEFT's scaling without alpha and rank."""
    full = full_scale(layer, name)
    # 12 digits: so that 0.8 is 0.8 again.
    return float(f"{float(layer.scaling[name]) / full:.12g}") if full else 0.0


def _one(table: Mapping[str, float]) -> Strength:
    """Return the strength of all modules, or the table if they have different ones."""
    return table if len(set(table.values())) > 1 else next(iter(table.values()))


def _lookup(strength: Strength, path: str) -> tuple[str | None, float]:
    """Return a module's entry in a table of strengths, and the strength; 1 without one, as in diffusers.

    An entry is a module's path or found anywhere in it, but "blocks.1" is not in "blocks.10".
    """
    if not isinstance(strength, Mapping):
        return None, check_strength(strength)
    if path in strength:
        return path, check_strength(strength[path])
    for entry, value in strength.items():
        if entry and re.search(re.escape(entry) + (r"(?!\d)" if entry[-1:].isdigit() else ""), path):
            return entry, check_strength(value)
    return None, 1.0


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{path}.weight"] = (module.out_features, module.in_features)
    own = {name: shape for name, shape in found.items() if not re.search(r"\.(lora|lokr|hada)_", name)}
    return {name.replace(".base_layer", ""): shape for name, shape in own.items()}
