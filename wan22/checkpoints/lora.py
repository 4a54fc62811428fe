"""Bring every LoRA dialect to one form: pairs of matrices and additive deltas, under our parameters' names.

Shapes: o outputs, i inputs of a layer, r rank.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .formats import WeightFile
from .keys import TRANSFORMER
from .loading import listed
from .quantized import QuantizedTensor

SLOTS = ("transformer", "transformer_2")
# What programs write before a module's name, for the second expert in a file of both, and for the first.
_SECOND = ("transformer_2.",)
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
# These programs also write "_" in place of ".".
_FLAT = ("lora_unet__", "lora_unet_", "lycoris_")
_PAIR = re.compile(
    r"(.+)\.(lora_down|lora_A|lora\.down|lora_up|lora_B|lora\.up)(?:\.(?!weight$)\w+)?\.weight"
)
_DOWN = ("lora_down", "lora_A", "lora.down")
# Whole differences of a weight, a bias, and of a modulation, which is neither.
_DELTAS = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
_OTHERS = {
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid": "LoCon with a third matrix",
    ".oft_": "OFT",
    ".boft_": "BOFT",
}
_NONE = torch.empty(0)


@dataclass
class Pair:
    """A layer's two matrices, whose product is added to its weight.

    Args:
        down: "r i"; empty until it is read.
        up: "o r"; likewise.
        alpha: the product is multiplied by alpha / r; None for r.
    """

    down: torch.Tensor = _NONE
    up: torch.Tensor = _NONE
    alpha: float | None = None


@dataclass
class Lora:
    """What a file changes in one transformer.

    Args:
        pairs: by layer.
        deltas: by parameter, what is added to it.
        unmatched: keys of the file that fit nothing in the transformer.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.pairs or self.deltas)


def read_lora(file: WeightFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lora]:
    """Sort a LoRA file's tensors by the transformer and the layer that they change.

    Args:
        file: as it was read; its tensors are not changed.
        shapes: of the transformer's parameters, by our names.

    Returns: by slot: "transformer" for all keys but those that name "transformer_2".

    Raises:
        ValueError: the file is of another kind of adapter, which is named; or a layer has half a pair.
    """
    for mark, kind in _OTHERS.items():
        if key := next((key for key in file.tensors if mark in key), None):
            raise ValueError(f"{file.source} is a {kind} adapter ({key}); LoRA and full differences are read")
    names = _names(shapes)
    loras = {slot: Lora() for slot in SLOTS}
    for key, tensor in file.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            raise ValueError(f"{file.source}: {key} is quantised; a LoRA must not be")
        slot, name = _slot(key)
        _sort_in(loras[slot], key, name, tensor, names)
    for lora in loras.values():
        half = [name for name, pair in lora.pairs.items() if pair.down is _NONE or pair.up is _NONE]
        if half:
            raise ValueError(f"{file.source}: of {listed(half)} there is only one of two matrices")
        _drop_misfits(lora, shapes)
    return loras


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
    """Return the transformer that a key is for, and the key without prefixes."""
    for prefix in _SECOND:
        if key.startswith(prefix):
            return SLOTS[1], key.removeprefix(prefix)
    for prefix in (*_PREFIXES, *_FLAT):
        key = key.removeprefix(prefix)
    return SLOTS[0], key


def _sort_in(lora: Lora, key: str, name: str, tensor: torch.Tensor, names: Mapping[str, str]) -> None:
    """Put one tensor of a file where it belongs."""
    for suffix, attribute in _DELTAS.items():
        if name.endswith(suffix):
            ours = names.get(name.removesuffix(suffix) + attribute)
            if ours is None:
                lora.unmatched.append(key)
            else:
                lora.deltas[ours] = tensor
            return
    match = _PAIR.fullmatch(name)
    module = match[1] if match else name.removesuffix(".alpha")
    ours = names.get(f"{module}.weight")
    if ours is None or not (match or name.endswith(".alpha")):
        lora.unmatched.append(key)
        return
    pair = lora.pairs.setdefault(ours.removesuffix(".weight"), Pair())
    if match is None:
        pair.alpha = float(tensor)
    elif match[2] in _DOWN:
        pair.down = tensor
    else:
        pair.up = tensor


def _drop_misfits(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Count as unmatched what is for a layer of another size, such as I2V's patch embedding in T2V."""
    for module, pair in list(lora.pairs.items()):
        shape = shapes[f"{module}.weight"]
        if (pair.up.shape[0], pair.down[0].numel()) != (shape[0], torch.Size(shape[1:]).numel()):
            lora.unmatched.append(module)
            del lora.pairs[module]
    for name, delta in list(lora.deltas.items()):
        if tuple(delta.shape) != tuple(shapes[name]):
            lora.unmatched.append(name)
            del lora.deltas[name]
