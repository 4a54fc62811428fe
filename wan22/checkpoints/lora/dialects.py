"""Bring every LoRA dialect to one form: matrices and whole differences, under our parameters' names.

Shapes: o outputs, i inputs of a layer, r rank.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..files.quantized import QuantizedTensor
from ..files.weights import WeightFile
from ..naming.keys import TRANSFORMER
from ..naming.names import listed

SLOTS = ("transformer", "transformer_2")
# What programs write before a module's name: for the second expert in a file of both, and otherwise.
_SECOND = "transformer_2."
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
# These programs also write "_" in place of ".".
_FLAT = ("lora_unet__", "lora_unet_", "lycoris_")
_PART = re.compile(
    r"(.+)\.(lora_down|lora_A|lora\.down|lora_up|lora_B|lora\.up|lora_magnitude_vector)(?:\.(?!weight$)\w+)?\.weight"
    r"|(.+)\.(dora_scale|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|lora_magnitude_vector)"
)
# PEFT's names of an adapter's parts; the others have the same name everywhere.
_PEFT = {"lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B"}
_PEFT |= {"dora_scale": "lora_magnitude_vector"}
_MAGNITUDE = "lora_magnitude_vector"
# Whole differences of a weight, a bias, and of a modulation, which is neither.
_DELTAS = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
_OTHERS = {
    ".lora_mid": "LoCon with a third matrix",
    ".lokr_t": "LoKr of a convolution",
    ".hada_t": "LoHa of a convolution",
    ".oft_": "OFT",
    ".boft_": "BOFT",
}


@dataclass
class AdapterWeights:
    """An adapter's matrices for one layer, whose product times alpha / r is added to the layer's weight.

    The parts have PEFT's names. LoRA: lora_A "r i" and lora_B "o r"; DoRA also lora_magnitude_vector "o".
    LoKr: lokr_w1 and lokr_w2, whole or as factors "_a" and "_b". LoHa: hada_w1_a to hada_w2_b.
    """

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None  # None: r

    @property
    def kind(self) -> str:
        """One of "lora", "dora", "lokr", "loha"."""
        first = next(iter(self.parts), "lora_")
        if _MAGNITUDE in self.parts:
            return "dora"
        return {"lora_": "lora", "lokr_": "lokr", "hada_": "loha"}[first[:5]]

    @property
    def complete(self) -> bool:
        """Whether no part is missing."""
        names = set(self.parts)
        if self.kind in ("lora", "dora"):
            return {"lora_A", "lora_B"} <= names
        if self.kind == "loha":
            return {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"} <= names
        return all({f"lokr_w{n}"} <= names or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= names for n in (1, 2))

    @property
    def rank(self) -> int:
        """The rank r; 1 for a LoKr that has none, whose alpha does not count."""
        sides = ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        return next((self.parts[side].shape[0] for side in sides if side in self.parts), 1)

    @property
    def scale_alpha(self) -> float:
        """The alpha that PEFT takes."""
        whole = self.kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(self.parts)
        return self.rank if self.alpha is None or whole else self.alpha

    def shape(self) -> tuple[int, int]:
        """Return the number of outputs and inputs of the layer."""
        if self.kind in ("lora", "dora"):
            return self.parts["lora_B"].shape[0], self.parts["lora_A"][0].numel()
        if self.kind == "loha":
            return self.parts["hada_w1_a"].shape[0], self.parts["hada_w1_b"].shape[1]
        outputs, inputs = (
            [self.parts[w if w in self.parts else w + side] for w in ("lokr_w1", "lokr_w2")]
            for side in ("_a", "_b")
        )
        return math.prod(len(w) for w in outputs), math.prod(w.shape[1] for w in inputs)


@dataclass
class Lora:
    """A file's weights for one transformer."""

    layers: dict[str, AdapterWeights] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)  # whole differences, by parameter
    unmatched: list[str] = field(default_factory=list)  # keys that fit nothing in the transformer
    source: str = ""  # the file; "" for a table of tensors

    def __bool__(self) -> bool:
        return bool(self.layers or self.deltas)


def read_lora(file: WeightFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lora]:
    """Return a LoRA file's weights by transformer, "transformer" for keys that do not name "transformer_2".

    `shapes` are those of the transformer's parameters, by our names. A ValueError names another kind of
    adapter, or a layer that is incomplete.
    """
    for mark, kind in _OTHERS.items():
        if key := next((key for key in file.tensors if mark in key), None):
            raise ValueError(f"{file.source} is a {kind} adapter ({key}), which is not read")
    names = _names(shapes)
    loras = {slot: Lora() for slot in SLOTS}
    for key, tensor in file.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            raise ValueError(f"{file.source}: {key} is quantised; a LoRA must not be")
        slot, name = _slot(key)
        _sort_in(loras[slot], key, name, tensor, names)
    for lora in loras.values():
        for name in [name for name, weights in lora.layers.items() if not weights.parts]:
            del lora.layers[name]  # an alpha alone, which some programs write beside a whole difference
            if f"{name}.weight" not in lora.deltas:
                lora.unmatched.append(f"{name}.alpha")
        if half := [name for name, weights in lora.layers.items() if not weights.complete]:
            raise ValueError(f"{file.source}: of {listed(half)} not all matrices are there")
        _drop_misfits(lora, shapes)
    return loras


def sections_of(file: WeightFile) -> tuple[str, ...]:
    """Return the transformers that a LoRA file's keys are for, "transformer" where they name none."""
    named = {_slot(key)[0] for key in file.tensors}
    return tuple(slot for slot in SLOTS if slot in named) or SLOTS[:1]


def _names(parameters: Iterable[str]) -> dict[str, str]:
    """Return our name of each parameter under all names that files may give it, without prefixes."""
    official = TRANSFORMER.inverse
    names: dict[str, str] = {}
    for ours in parameters:
        for name in {ours, official.rename(ours) or ours}:
            module, _, attribute = name.rpartition(".")
            names[name] = names[f"{module.replace('.', '_')}.{attribute}"] = ours
    return names


def _slot(key: str) -> tuple[str, str]:
    """Return a key's transformer, and the key without prefixes."""
    if key.startswith(_SECOND):
        return SLOTS[1], key.removeprefix(_SECOND)
    for prefix in (*_PREFIXES, *_FLAT):
        key = key.removeprefix(prefix)
    return SLOTS[0], key


def _sort_in(lora: Lora, key: str, name: str, tensor: torch.Tensor, names: Mapping[str, str]) -> None:
    """Add one tensor of a file to a LoRA, under our name."""
    for suffix, attribute in _DELTAS.items():
        if name.endswith(suffix):
            ours = names.get(name.removesuffix(suffix) + attribute)
            if ours is None:
                lora.unmatched.append(key)
            else:
                lora.deltas[ours] = tensor
            return
    match = _PART.fullmatch(name)
    module = (match[1] or match[3]) if match else name.removesuffix(".alpha")
    ours = names.get(f"{module}.weight")
    if ours is None or not (match or name.endswith(".alpha")):
        lora.unmatched.append(key)
        return
    weights = lora.layers.setdefault(ours.removesuffix(".weight"), AdapterWeights())
    if match is None:
        weights.alpha = float(tensor)
    else:
        part = match[2] or match[4]
        weights.parts[_PEFT.get(part, part)] = tensor


def _drop_misfits(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Count weights for a layer of another size, such as I2V's patch embedding in T2V, as unmatched."""
    for module, weights in list(lora.layers.items()):
        shape = shapes[f"{module}.weight"]
        magnitude = weights.parts.get(_MAGNITUDE)
        fits = weights.shape() == (shape[0], math.prod(shape[1:]))
        if not fits or (magnitude is not None and magnitude.numel() != shape[0]):
            lora.unmatched.append(module)
            del lora.layers[module]
    for name, delta in list(lora.deltas.items()):
        if tuple(delta.shape) != tuple(shapes[name]):
            lora.unmatched.append(name)
            del lora.deltas[name]
