"""LoRAs for pipelines with one or two transformers."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ...checkpoints.files.hub import OPTIONS
from ...checkpoints.files.weights import WeightFile
from ...checkpoints.lora.adapters import Adapters, adapters_of, has_adapters
from ...checkpoints.lora.dialects import read_lora, section_for, sections_of
from ...checkpoints.lora.scales import check_strength
from ...checkpoints.lora.sources import TABLE, LoraSource, pair_in, read_source, warn_if_swapped
from ...checkpoints.lora.spellings import SLOTS
from ...checkpoints.lora.weights import Lora
from ...checkpoints.naming.names import listed
from ...checks import shown
from .part import Part

logger = logging.getLogger(__name__)

# One strength for all experts, or one for each: (high, low), or by the transformer's name.
Strength = float | Sequence[float] | Mapping[str, float]


class Loras(Part):
    """LoRAs in a pipeline's transformers; the methods have the names that diffusers gives them.

    Adapters are active from when they are loaded until `set_adapters` leaves them out.
    """

    def load_lora_weights(
        self,
        lora: Any = None,
        adapter_name: str | None = None,
        *,
        high: Any = None,
        low: Any = None,
        strength: Strength = 1.0,
        weight_name: str | None = None,
        subfolder: str = "",
        **hub: Any,
    ) -> str:
        """Load a LoRA in any dialect, for all transformers or as a pair for the two experts; return its name.

        Args:
            lora: file, folder, repository, or table of tensors, for both experts; its keys below
                "transformer_2." are for the low-noise expert alone. A folder or repository that holds
                high_noise_model.safetensors and low_noise_model.safetensors is a pair.
            adapter_name: default is "lora_0", "lora_1", …
            high, low: the high-noise and the low-noise expert's, in any of these forms.
            strength: factor of its weights: one number, two (high, low), or a table such as
                {"transformer": 1, "transformer_2": 0.5}.
            weight_name: file in the folder or repository.
            subfolder: folder of that file in there.
            **hub: `cache_dir`, `force_download`, `token`, `local_files_only`, `revision`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: nothing in the file fits the transformer, it is no LoRA, or the name is taken.
        """
        if unknown := sorted(hub.keys() - OPTIONS):
            hint = "; one LoRA goes into both experts here, give high= and low= for one each"
            hint = hint if "load_into_transformer_2" in unknown else ""
            raise ValueError(f"load_lora_weights takes no {', '.join(unknown)}{hint}")
        if (lora is None) == (high is None and low is None):
            raise ValueError("give one LoRA, or high= and low=")
        name = adapter_name or self._free_name()
        if name in self._strengths():
            raise ValueError(f"there is an adapter {shown(name)} already; choose another name")
        loras = self._read_loras(lora, (high, low), LoraSource(weight_name, subfolder, hub))
        self._pipe.memory.offload_all()
        strengths = _by_slot(strength)
        for slot, part in loras.items():
            adapters_of(getattr(self._pipe, slot)).load(name, part, strengths[slot])
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
        many = isinstance(adapter_weights, Sequence) and not isinstance(adapter_names, str)
        weights: list[Any] = list(adapter_weights) if many else [adapter_weights] * len(names)  # type: ignore[arg-type]
        if len(weights) != len(names):
            raise ValueError(
                f"{len(weights)} strengths for {len(names)} adapters; give {len(names)}, or one for all"
            )
        chosen = {name: _by_slot(1.0 if w is None else w) for name, w in zip(names, weights, strict=True)}
        self._pipe.memory.offload_all()
        for slot, adapters in self._adapters().items():
            adapters.set({name: strengths[slot] for name, strengths in chosen.items()})

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the loaded adapters of each transformer that has any."""
        return {slot: list(a.strengths) for slot, a in self._adapters().items() if a.strengths}

    def get_active_adapters(self) -> list[str]:
        """Return the adapters that change something now."""
        active = {
            n: None for a in self._adapters().values() if a.enabled for n, s in a.strengths.items() if s
        }
        return list(active)

    def disable_lora(self) -> None:
        """Compute without adapters until `enable_lora`."""
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
        """Take all adapters out; the transformers are then as they were before the first, to the bit."""
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.remove(list(adapters.strengths))

    def fuse_lora(self, dequantize: bool = False) -> None:
        """Add the active adapters to the weights of all transformers, so that they cost no time.

        The weights as they were are kept in the host's memory.

        Args:
            dequantize: whether to expand quantised layers for it, which then need an ordinary layer's memory.

        Raises:
            ValueError: layers are quantised and dequantize is False, or a LoRA is fused already.
        """
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.fuse(dequantize)

    def unfuse_lora(self) -> None:
        """Give all transformers the weights back that they had before `fuse_lora`, to the bit."""
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.unfuse()

    # ---- files ----

    def _read_loras(self, lora: Any, pair: tuple[Any, Any], where: LoraSource) -> dict[str, Lora]:
        """Read a file for both experts, or one for each; return what each transformer gets."""
        if lora is not None and (found := pair_in(lora, where)):
            lora, pair = None, found
        if lora is None:
            warn_if_swapped(*pair)
            sources = dict(zip(SLOTS, pair, strict=True))
            files = {slot: read_source(s, where) for slot, s in sources.items() if s is not None}
            # What is given for one expert is for that one, whichever its keys name.
            return self._parts({slot: (file, section_for(file, slot)) for slot, file in files.items()})
        file = read_source(lora, where)
        sections = sections_of(file)
        if not sections:  # the keys name no expert: for all that are loaded
            loaded = [slot for slot in SLOTS if getattr(self._pipe, slot) is not None]
            return self._parts({slot: (file, SLOTS[0]) for slot in loaded})
        return self._parts({slot: (file, slot) for slot in sections})

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
        if lora.unmatched:
            logger.warning("%s: %s fit nothing in %s", file.source, listed(lora.unmatched), slot)
        return lora

    # ---- adapters ----

    def restore_strengths(self) -> None:
        """Give the LoRAs the strengths they had before a call; attention_kwargs' scale of 0 leaves others."""
        for model in self._pipe.transformers:
            if has_adapters(model):
                adapters_of(model).restore()

    def _adapters(self) -> dict[str, Adapters]:
        return {slot: adapters_of(m) for slot in SLOTS if (m := getattr(self._pipe, slot)) is not None}

    def _strengths(self) -> set[str]:
        return {name for adapters in self._adapters().values() for name in adapters.strengths}

    def _free_name(self) -> str:
        return next(name for i in range(10**6) if (name := f"lora_{i}") not in self._strengths())

    def _check_names(self, names: Sequence[str]) -> None:
        known = sorted(self._strengths())
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"there is no adapter {shown(unknown[0])}; there is {', '.join(known) or 'none'}"
            )

    def _switch(self, enabled: bool) -> None:
        self._pipe.memory.offload_all()
        for adapters in self._adapters().values():
            adapters.enable(enabled)


def _by_slot(strength: Strength) -> dict[str, float]:
    if isinstance(strength, Mapping):
        if unknown := sorted(strength.keys() - set(SLOTS)):
            raise ValueError(f"a strength is given for {shown(unknown[0])}; there are {' and '.join(SLOTS)}")
        return {slot: check_strength(strength.get(slot, 1.0)) for slot in SLOTS}
    if isinstance(strength, Sequence):
        if len(strength) != len(SLOTS):
            raise ValueError(f"strength={shown(strength)} must be one number, or two: (high, low)")
        return dict(zip(SLOTS, map(check_strength, strength), strict=True))
    return dict.fromkeys(SLOTS, check_strength(strength))
