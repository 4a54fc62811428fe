"""LoRAs for pipelines with one or two transformers."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.files.hub import OPTIONS
from ...checkpoints.files.weights import WeightFile
from ...checkpoints.lora.adapters import Adapters, adapters_of
from ...checkpoints.lora.adapters import Strength as OneStrength
from ...checkpoints.lora.dialects import read_lora, section_for, sections_of
from ...checkpoints.lora.scales import check_strength
from ...checkpoints.lora.sources import (
    TABLE,
    LoraSource,
    lora_fingerprint,
    pair_in,
    read_source,
    warn_if_swapped,
)
from ...checkpoints.lora.spellings import SLOTS
from ...checkpoints.lora.weights import Lora
from ...checks import keywords_of, listed, refuse_unknown, shown
from ...private_apis import uncompiled
from .part import Part

logger = logging.getLogger(__name__)

# One strength for all experts, or one for each: (high, low), or by the transformer's name.
Strength = float | Sequence[float] | Mapping[str, OneStrength | None]


class Loras(Part):
    """LoRAs in a pipeline's transformers; the methods have the names that diffusers gives them.

    Adapters are active from when they are loaded until `set_adapters` leaves them out.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any = None,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        high: Any = None,
        low: Any = None,
        strength: Strength = 1.0,
        weight_name: str | None = None,
        subfolder: str = "",
        load_into_transformer_2: bool = False,
        low_cpu_mem_usage: bool = True,
        use_safetensors: bool | None = None,
        **hub: Any,
    ) -> str:
        """Load a LoRA in any dialect, for all transformers or as a pair for the two experts; return its name.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, repository, or table of tensors, for both
                experts; its keys below "transformer_2." are for the low-noise expert alone. A folder or
                repository that holds high_noise_model.safetensors and low_noise_model.safetensors is a pair.
            adapter_name: any text; default is "default_0", "default_1", …
            hotswap: whether to give the adapter of that name other weights in place, so that nothing is
                compiled anew; see `enable_lora_hotswap`.
            high, low: the high-noise and the low-noise expert's, in any of these forms.
            strength: factor of its weights: one number, two (high, low), or a table such as
                {"transformer": 1, "transformer_2": 0.5} or {"transformer": {"blocks.0": 0.5}}.
            weight_name: file in the folder or repository.
            subfolder: folder of that file in there.
            load_into_transformer_2: whether it is for the low-noise expert alone, as low=. What was loaded
                before for both, by calls that did not say so, is then taken out of the low-noise expert: a
                script of two calls, as diffusers needs, has each file in its own expert.
            low_cpu_mem_usage, use_safetensors: change nothing here: weights are not initialised first, and no
                code in a file is run.
            **hub: `cache_dir`, `force_download`, `token`, `local_files_only`, `revision`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: nothing in the file fits the transformer, it is no LoRA, the name is taken, or there
                is no such expert; with hotswap, there is no such adapter or it lacks a layer.
        """
        lora = pretrained_model_name_or_path_or_dict
        refuse_unknown("load_lora_weights", hub, {*keywords_of(self.load_lora_weights), *OPTIONS})
        if (lora is None) == (high is None and low is None):
            raise ValueError("give one LoRA, or high= and low=")
        if load_into_transformer_2:
            if lora is None:
                raise ValueError(
                    "load_into_transformer_2=True is for one LoRA; leave it out with high=, low="
                )
            lora, low = None, lora
        strengths = _by_slot(strength)
        loras, into_both = self._read_loras(lora, (high, low), LoraSource(weight_name, subfolder, hub))
        self._check_experts(len(loras) == 2 and not into_both, strengths)
        self._pipe.memory.offload_all()
        if hotswap:
            return self._swap(loras, adapter_name, strengths, into_both)
        if load_into_transformer_2:
            self._delete_from_second()
        targets = {slot: self._adapters()[slot] for slot in loras}
        taken = {name for adapters in targets.values() for name in adapters.names}
        name = _free_name(taken) if adapter_name is None else adapter_name
        if name in taken:
            raise ValueError(f"there is an adapter {shown(name)} already; choose another name")
        for slot, adapters in targets.items():
            adapters.load(name, loras[slot], strengths[slot], into_both)
        return name

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Strength | Sequence[Strength | None] | None = None,
    ) -> None:
        """Choose the active adapters; all others are off. An unknown name is a ValueError.

        Args:
            adapter_names: the adapters to be active.
            adapter_weights: one strength for all, or a list with one for each adapter; each as the strength
                of `load_lora_weights`. None: 1.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        weights: list[Any] = [adapter_weights] * len(names)
        if isinstance(adapter_weights, Sequence):
            pair = isinstance(adapter_names, str) and len(adapter_weights) == len(SLOTS)
            weights = weights if pair else list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(
                f"{len(weights)} strengths for {len(names)} adapters; give {len(names)}, or one for all"
            )
        chosen = {name: _by_slot(self._known(w)) for name, w in zip(names, weights, strict=True)}
        for strengths in chosen.values():
            self._check_experts(False, strengths)
        self._pipe.memory.offload_all()
        for slot, adapters in self._adapters().items():
            here = [name for name in names if name in adapters.names]
            adapters.set({name: chosen[name][slot] for name in here})

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the loaded adapters of each transformer that has any."""
        return {slot: names for slot, a in self._adapters().items() if (names := a.names)}

    def get_active_adapters(self) -> list[str]:
        """Return the adapters that are chosen, in any transformer."""
        return list({name: None for adapters in self._adapters().values() for name in adapters.active})

    def disable_lora(self) -> None:
        """Compute without adapters until `enable_lora`; fused ones are taken out first, to the bit."""
        self._switch(False)

    def enable_lora(self) -> None:
        """Compute with the adapters again."""
        self._switch(True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out; an unknown name is a ValueError."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.remove(names)

    def unload_lora_weights(self) -> None:
        """Take all adapters out: the transformers are as before the first, to the bit, but for what is fused.

        Fused adapters stay in the weights, as in diffusers; `unfuse_lora` before takes them out.
        """
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.unload()

    def fuse_lora(
        self,
        components: str | Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> None:
        """Add adapters to the weights, so that they cost no time; the weights before are kept on the host.

        Fused layers compute with what is fused in them alone, whatever is loaded or set afterwards.

        Args:
            components: "transformer", "transformer_2", or a list of them; default is all that are loaded (in
                diffusers the first).
            lora_scale: factor of the strengths.
            safe_fusing: whether to refuse weights that are not finite.
            adapter_names: default is the active ones.
            dequantize: whether to expand quantised layers, and those of layerwise casting, for it; they then
                need an ordinary layer's memory.

        Raises:
            ValueError: there is no such component or adapter; layers are quantised or cast and dequantize is
                False; or weights are not finite and safe_fusing is True. Nothing is fused then.
            MemoryError: the host has no room for the fused weights beside those before. Nothing is fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_names(names or [])
        chosen = self._components(components)
        self._pipe.memory.offload_all()
        done: list[tuple[Adapters, list[Any]]] = []
        try:
            for adapters in chosen:
                done.append((adapters, adapters.fuse(names, lora_scale, safe_fusing, dequantize)))
        except (ValueError, MemoryError):
            for adapters, layers in done:
                adapters.unfuse(layers)
            raise

    def unfuse_lora(self, components: str | Sequence[str] | None = None) -> None:
        """Give transformers, all by default, the weights that they had before `fuse_lora`, to the bit."""
        chosen = self._components(components)
        self._pipe.memory.offload_all()
        for adapters in chosen:
            adapters.unfuse()

    def fused_names(self) -> set[str]:
        """Return the adapters that are in the weights."""
        return {name for adapters in self._adapters().values() for name in adapters.in_weights}

    def set_lora_device(self, adapter_names: str | Sequence[str], device: Any) -> None:
        """Move adapters' matrices to a device, such as those of unused ones to the CPU.

        Raises:
            ValueError: there is no such adapter, or a memory plan moves the models.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        self._pipe.memory.check_movable(device)
        for adapters in self._adapters().values():
            adapters.move(names, device)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Let the next adapter be hotswapped without compiling anew; call it before loading it.

        Args:
            target_rank: the largest rank of the LoRAs to come; matrices are filled with zeros to it.
            check_compiled: what to do about a model that has adapters already, or is compiled: "error",
                "warn" or "ignore".
        """
        for slot in self._adapters():
            uncompiled(getattr(self._pipe, slot)).enable_lora_hotswap(target_rank, check_compiled)

    # ---- files ----

    def check_lora(
        self,
        pretrained_model_name_or_path_or_dict: Any = None,
        *,
        high: Any = None,
        low: Any = None,
        strength: Strength = 1.0,
    ) -> None:
        """Read a LoRA's files as `load_lora_weights` does, and raise its errors; nothing is attached."""
        lora, where = pretrained_model_name_or_path_or_dict, LoraSource(None, None, {})
        loras, into_both = self._read_loras(lora, (high, low), where)
        self._check_experts(len(loras) == 2 and not into_both, _by_slot(strength))

    def _read_loras(
        self, lora: Any, pair: tuple[Any, Any], where: LoraSource
    ) -> tuple[dict[str, Lora], bool]:
        """Read a file for both experts, or one for each.

        Returns: what each transformer gets, and whether it is one LoRA for all as nothing says otherwise.
        """
        if lora is not None and (found := pair_in(lora, where)):
            lora, pair = None, found
        if lora is None:
            warn_if_swapped(*pair)
            sources = dict(zip(SLOTS, pair, strict=True))
            files = {slot: read_source(s, where) for slot, s in sources.items() if s is not None}
            # What is given for one expert is for that one, whichever its keys name.
            return self._parts({slot: (file, section_for(file, slot)) for slot, file in files.items()}), False
        file = read_source(lora, where)
        sections = sections_of(file)
        if not sections:  # the keys name no expert: for all that are loaded
            return self._parts({slot: (file, SLOTS[0]) for slot in self._adapters()}), True
        return self._parts({slot: (file, slot) for slot in sections}), False

    def _parts(self, sources: Mapping[str, tuple[WeightFile, str]]) -> dict[str, Lora]:
        if lacking := [slot for slot in sources if getattr(self._pipe, slot) is None]:
            raise ValueError(f"there is a LoRA for {lacking[0]}, which is not loaded")
        return {slot: self._part(file, slot, section) for slot, (file, section) in sources.items()}

    def _part(self, file: WeightFile, slot: str, section: str) -> Lora:
        lora = read_lora(file, adapters_of(getattr(self._pipe, slot)).shapes)[section]
        if not lora:
            raise ValueError(
                f"{file.source}: no key fits {slot}; "
                + (f"there are {listed(lora.unmatched)}" if lora.unmatched else "there is none for it")
            )
        lora.source = "" if file.source == TABLE else file.source
        lora.fingerprint = lora_fingerprint(Path(lora.source)) if lora.source else ""
        if lora.unmatched:
            logger.warning("%s: %s fit nothing in %s", file.source, listed(lora.unmatched), slot)
        return lora

    # ---- adapters ----

    def _adapters(self) -> dict[str, Adapters]:
        return {slot: adapters_of(m) for slot in SLOTS if (m := getattr(self._pipe, slot)) is not None}

    def _components(self, names: str | Sequence[str] | None) -> list[Adapters]:
        names = SLOTS if names is None else [names] if isinstance(names, str) else names
        if not names or not set(names) <= set(SLOTS):
            raise ValueError(f"components={shown(list(names))} must be of {' and '.join(SLOTS)}")
        return [adapters for slot, adapters in self._adapters().items() if slot in names]

    def _check_experts(self, two_loras: bool, strengths: Mapping[str, OneStrength]) -> None:
        """Refuse what is different for two experts that are one model."""
        if self._pipe.transformer is not self._pipe.transformer_2:
            return
        if two_loras or len({repr(strength) for strength in strengths.values()}) > 1:
            raise ValueError(
                "transformer and transformer_2 are one and the same model, which takes one LoRA of a name, "
                "and one strength; give one for both"
            )

    def _swap(
        self,
        loras: Mapping[str, Lora],
        name: str | None,
        strengths: Mapping[str, OneStrength],
        into_both: bool,
    ) -> str:
        targets = {slot: a for slot, a in self._adapters().items() if slot in loras and name in a.names}
        if name is None or not targets:
            known = ", ".join(sorted(self._names())) or "none"
            raise ValueError(f"hotswap=True: adapter_name={shown(name)} must be loaded; there is {known}")
        if not into_both and (lacking := sorted(loras.keys() - targets.keys())):
            raise ValueError(f"hotswap=True: {lacking[0]} has no adapter {shown(name)} to be replaced")
        for slot, adapters in targets.items():
            adapters.swap(name, loras[slot], strengths[slot])
        return name

    def _delete_from_second(self) -> None:
        """Delete, from the low-noise expert, the adapters that calls without an expert loaded into both."""
        adapters = self._adapters()[SLOTS[1]]
        if names := adapters.into_both:
            logger.warning(
                "%s was loaded for both experts; as this call is for transformer_2 alone, it is taken out "
                "there. To keep it, give low= instead of load_into_transformer_2=True",
                ", ".join(names),
            )
            adapters.unfuse_at_strengths(f"{', '.join(names)} can be taken out")
            adapters.remove(names)

    def _names(self) -> set[str]:
        return {name for adapters in self._adapters().values() for name in adapters.names}

    def _check_names(self, names: Sequence[str]) -> None:
        known = sorted(self._names())
        if unknown := [name for name in names if name not in known]:
            present = ", ".join(known) or "none"
            raise ValueError(f"adapter {shown(unknown[0])} is not in the list of present adapters: {present}")

    def _known(self, strength: Strength | None) -> Strength:
        """Return a strength without the entries of what the pipeline does not have, as diffusers reads it."""
        if strength is None:
            return 1.0
        if not isinstance(strength, Mapping) or strength.keys() <= set(SLOTS):
            return strength
        paths = [path for adapters in self._adapters().values() for path, _ in adapters.model.named_modules()]
        if all(any(key in path for path in paths) for key in strength):  # a table by modules, for all
            return {slot: dict(strength) for slot in SLOTS}  # type: ignore[arg-type]
        # Scripts written for diffusers look for its message, in its log.
        logging.getLogger("diffusers.loaders.lora_base").warning(
            "The following components in `adapter_weights` are not part of the pipeline: %s. "
            "They are left out; there are %s.",
            sorted(strength.keys() - set(SLOTS)),
            " and ".join(SLOTS),
        )
        return {slot: value for slot, value in strength.items() if slot in SLOTS}

    def _switch(self, enabled: bool) -> None:
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.enable(enabled)


def _free_name(taken: set[str]) -> str:
    return next(name for i in range(10**6) if (name := f"default_{i}") not in taken)


def _by_slot(strength: Strength) -> dict[str, OneStrength]:
    if isinstance(strength, Mapping):
        if unknown := sorted(strength.keys() - set(SLOTS)):
            raise ValueError(f"a strength is given for {shown(unknown[0])}; there are {' and '.join(SLOTS)}")
        return {slot: 1.0 if (s := strength.get(slot)) is None else _checked(s) for slot in SLOTS}
    if isinstance(strength, Sequence):
        if len(strength) != len(SLOTS):
            raise ValueError(f"strength={shown(strength)} must be one number, or two: (high, low)")
        return {slot: _checked(s) for slot, s in zip(SLOTS, strength, strict=True)}
    return dict.fromkeys(SLOTS, _checked(strength))


def _checked(strength: OneStrength) -> OneStrength:
    return dict(strength) if isinstance(strength, Mapping) else check_strength(strength)
