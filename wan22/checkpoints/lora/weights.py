"""A LoRA's weights for one transformer, in one form whatever file they came from.

Shapes: o outputs, i inputs of a layer, r rank.
"""

import math
from dataclasses import dataclass, field

import torch

MAGNITUDE = "lora_magnitude_vector"


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
        if MAGNITUDE in self.parts:
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
    def whole(self) -> bool:
        """Whether it is a LoKr of two whole matrices, which have no rank."""
        return {"lokr_w1", "lokr_w2"} <= set(self.parts)

    @property
    def rank(self) -> int:
        """The rank r; 1 for a LoKr that has none."""
        sides = ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        return next((self.parts[side].shape[0] for side in sides if side in self.parts), 1)

    @property
    def scale_alpha(self) -> float:
        """The alpha that PEFT takes."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def changes_nothing(self) -> bool:
        """Whether the factor or one of the matrices of a product is zero."""
        return not self.scale_alpha or (self.kind == "lora" and not all(p.any() for p in self.parts.values()))

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

    def check(self) -> None:
        """Raise ValueError for matrices that cannot be multiplied."""
        if len({name[:5] for name in self.parts}) > 1:
            raise ValueError(f"{', '.join(sorted(self.parts))} are of different kinds of adapters")
        for name, part in self.parts.items():
            # Three axes are neither a linear layer's nor those of a convolution in rows, columns and frames.
            if name != MAGNITUDE and (part.ndim in (0, 1, 3) or 0 in part.shape):
                raise ValueError(f"{name} has shape {tuple(part.shape)} and is no matrix")
        pairs = [("lora_B", "lora_A"), *((f"{w}_a", f"{w}_b") for w in _FACTORED)]
        for left, right in pairs:
            if left in self.parts and right in self.parts:
                shapes = [tuple(self.parts[side].shape) for side in (left, right)]
                if shapes[0][1] != shapes[1][0]:
                    raise ValueError(
                        f"the ranks of {left} {shapes[0]} and {right} {shapes[1]} disagree: "
                        f"{shapes[0][1]} and {shapes[1][0]}"
                    )
        if self.kind == "loha":
            first, second = ([len(self.parts[f"{w}_a"]), self.parts[f"{w}_b"].shape[1]] for w in _HADAMARD)
            if first != second:
                raise ValueError(f"the two products are of different sizes, {first} and {second}")


_HADAMARD = ("hada_w1", "hada_w2")
_FACTORED = (*_HADAMARD, "lokr_w1", "lokr_w2")


@dataclass
class Lora:
    """A file's weights for one transformer."""

    layers: dict[str, AdapterWeights] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)  # whole differences, by parameter
    unmatched: list[str] = field(default_factory=list)  # keys that fit nothing in the transformer
    source: str = ""  # the file; "" for a table of tensors
    fingerprint: str = ""  # the file's when it was read

    def __bool__(self) -> bool:
        return bool(self.layers or self.deltas)

    @property
    def changes_nothing(self) -> bool:
        """Whether no weight is another one with it."""
        nil = all(weights.changes_nothing for weights in self.layers.values())
        return nil and not any(delta.any() for delta in self.deltas.values())
