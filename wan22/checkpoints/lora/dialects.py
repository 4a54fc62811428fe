"""Bring every LoRA dialect to one form: matrices and whole differences, under our parameters' names."""

import math
from collections.abc import Mapping

import torch

from ...checks import cut, listed
from ..files.quantized import QuantizedTensor
from ..files.weights import WeightFile
from ..naming.keys import TRANSFORMER
from .scales import Scaling, stabilised_alpha, written_scaling
from .spellings import BIAS, DELTAS, SLOTS, names_of, read_key
from .weights import MAGNITUDE, AdapterWeights, Lora

_OTHERS = {
    ".lora_mid": "LoCon with a third matrix",
    ".lokr_t": "LoKr of a convolution",
    ".hada_t": "LoHa of a convolution",
    ".oft_": "OFT",
    ".boft_": "BOFT",
}
# Blissful Tuner's notes for all layers: whether the alphas are rank-stabilised, and whether it is DoRA.
_STABILISED, _DORA = "use_rslora_flag", "use_dora_flag"


def read_lora(file: WeightFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lora]:
    """Return a LoRA file's weights by transformer, "transformer" for keys that do not name "transformer_2".

    `shapes` are those of the transformer's parameters, by our names. A ValueError names another kind of
    adapter; a layer that is incomplete, twice there, or whose matrices do not fit together; a number that
    is not finite; and a configuration that contradicts the tensors.
    """
    for mark, kind in _OTHERS.items():
        if key := next((key for key in file.tensors if mark in key), None):
            raise ValueError(f"{file.source} is a {kind} adapter ({listed([key])}), which is not read")
    names = names_of(shapes)
    readers = {slot: _Reader(file, slot) for slot in SLOTS}
    for key in file.tensors:
        if key in (_STABILISED, _DORA):
            continue
        spelled = read_key(key)
        readers[spelled.expert or SLOTS[0]].add(key, spelled.module, spelled.part, names)
    return {slot: reader.lora(shapes) for slot, reader in readers.items()}


def sections_of(file: WeightFile) -> tuple[str, ...]:
    """Return the transformers that a LoRA file's keys name; () if they name none, and it is for any.

    Beside keys for the second, those that name none are for the first.
    """
    named = {read_key(key).expert for key in file.tensors}
    if SLOTS[1] in named and None in named:
        named.add(SLOTS[0])
    return tuple(slot for slot in SLOTS if slot in named)


def section_for(file: WeightFile, slot: str) -> str:
    """Return the section of a file that is given for one expert: its own, or the only one that there is."""
    sections = sections_of(file) or SLOTS[:1]
    return slot if slot in sections else sections[0]


class _Reader:
    """Sorts a file's tensors for one transformer into layers and whole differences."""

    def __init__(self, file: WeightFile, slot: str) -> None:
        self._file, self._slot = file, slot
        self._lora = Lora()
        self._keys: dict[tuple[str, str], str] = {}  # by layer or parameter, and part
        self._modules: dict[str, str] = {}  # the file's name of each layer
        self._biases: dict[str, torch.Tensor] = {}

    def add(self, key: str, module: str, part: str | None, names: Mapping[str, str]) -> None:
        """Sort one tensor in, under our name."""
        if part in DELTAS:
            places = (names.get(module + suffix) for suffix in DELTAS[part])
            ours = next((place for place in places if place), None)
        else:
            ours = names.get(f"{module}.weight") if part else None
        if ours is None:
            self._lora.unmatched.append(key)
            return
        tensor = self._checked(key, floating=part != "alpha")
        if part in DELTAS:
            self._claim(ours, "difference", key)
            self._lora.deltas[ours] = tensor
            return
        layer = ours.removesuffix(".weight")
        self._claim(layer, str(part), key)
        self._modules[layer] = module
        weights = self._lora.layers.setdefault(layer, AdapterWeights())
        if part == "alpha":
            weights.alpha = self._number(key, tensor)
        elif part == BIAS:
            self._biases[layer] = tensor
        else:
            weights.parts[str(part)] = tensor

    def lora(self, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
        """Return all that was sorted in, with each layer's scale."""
        layers = self._lora.layers
        for name in [name for name, weights in layers.items() if not weights.parts]:
            if name not in self._biases:
                del layers[name]  # an alpha alone, which some programs write beside a whole difference
                if f"{name}.weight" not in self._lora.deltas:
                    self._lora.unmatched.append(f"{name}.alpha")
        if half := [name for name, weights in layers.items() if not weights.complete]:
            raise ValueError(f"{self._file.source}: of {listed(half)} not all matrices are there")
        written = written_scaling(self._file, self._slot) if layers else None
        for name, weights in layers.items():
            try:
                weights.check()
                weights.alpha = self._alpha(name, weights, written)
            except ValueError as error:
                raise ValueError(f"{self._file.source}: {cut(name)}: {error}") from error
        self._add_biases(shapes)
        _drop_misfits(self._lora, shapes)
        return self._lora

    def _alpha(self, name: str, weights: AdapterWeights, written: Scaling | None) -> float | None:
        if weights.alpha is None:
            official = str(TRANSFORMER.inverse.rename(f"{name}.weight")).removesuffix(".weight")
            known = (self._modules[name], name, official)
            return None if written is None else written.alpha_of(weights, known)
        if weights.whole:
            return None  # LyCORIS writes one, and does not use it
        flag = self._file.tensors.get(_STABILISED)
        stabilised = isinstance(flag, torch.Tensor) and bool(flag.any())
        return stabilised_alpha(weights, weights.alpha) if stabilised else weights.alpha

    def _add_biases(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make differences of the biases after second matrices, which have the matrices' scale."""
        for name, bias in self._biases.items():
            weights, parameter = self._lora.layers[name], f"{name}.bias"
            key = self._keys[name, BIAS]
            if weights.kind != "lora" or parameter not in shapes:
                raise ValueError(
                    f"{self._file.source}: {listed([key])}: such a bias is not read for this layer"
                )
            self._claim(parameter, "difference", key)
            self._lora.deltas[parameter] = bias.float() * (weights.scale_alpha / weights.rank)

    def _claim(self, place: str, part: str, key: str) -> None:
        other = self._keys.setdefault((place, part), key)
        if other != key:
            raise ValueError(
                f"{self._file.source}: {listed([other])} and {listed([key])} are for the same part of {place}"
            )

    def _checked(self, key: str, floating: bool) -> torch.Tensor:
        tensor = self._file.tensors[key]
        if isinstance(tensor, QuantizedTensor):
            raise ValueError(f"{self._file.source}: {listed([key])} is quantised; a LoRA must not be")
        if tensor.is_complex() or (floating and not tensor.is_floating_point()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self._file.source}: {listed([key])} is {kind}; a LoRA of such numbers is not read"
            )
        values = tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor
        # The extremes are NaN or infinite if anything is, and cost no memory.
        if values.numel() and not all(math.isfinite(float(x)) for x in torch.aminmax(values)):
            raise ValueError(f"{self._file.source}: {listed([key])} holds NaN or infinity")
        return tensor

    def _number(self, key: str, tensor: torch.Tensor) -> float:
        if tensor.numel() != 1:
            shape = tuple(tensor.shape)
            raise ValueError(
                f"{self._file.source}: {listed([key])} must be one number, and has shape {shape}"
            )
        return float(tensor)


def _drop_misfits(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Count weights for a layer of another size, such as I2V's patch embedding in T2V, as unmatched."""
    for module, weights in list(lora.layers.items()):
        shape = shapes[f"{module}.weight"]
        magnitude = weights.parts.get(MAGNITUDE)
        fits = weights.shape() == (shape[0], math.prod(shape[1:]))
        if not fits or (magnitude is not None and magnitude.numel() != shape[0]):
            lora.unmatched.append(module)
            del lora.layers[module]
    for name, delta in list(lora.deltas.items()):
        if tuple(delta.shape) != tuple(shapes[name]):
            lora.unmatched.append(name)
            del lora.deltas[name]
