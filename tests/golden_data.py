"""Reads tests/golden: numbers of the official code, see its README."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    """One golden set: description, official weights, inputs and outputs."""

    info: dict
    weights: dict[str, torch.Tensor]
    io: dict[str, torch.Tensor]


@cache
def golden(name: str) -> Golden:
    """Read a golden set by its name, such as "vae21"; a part that does not exist is empty."""

    def tensors(part: str) -> dict[str, torch.Tensor]:
        path = FOLDER / f"{name}.{part}.safetensors"
        return load_file(path) if path.exists() else {}

    return Golden(json.loads((FOLDER / f"{name}.json").read_text()), tensors("weights"), tensors("io"))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())
