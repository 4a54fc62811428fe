"""Weights in fewer bytes than their values: scaled float8 and int8, and GGUF's blocks; nvfp4.py has NVFP4.

Shapes: o outputs, i inputs of a linear layer, g groups of inputs with a scale of their own.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

from ...devices import compiles_float8

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF = (torch.float16, torch.bfloat16)
FLOAT32_FIRST = ("cpu",)  # devices that are slower at products in a half dtype
_NAMES = {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8 e5m2"}  # of kinds that say it otherwise
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Rows of a weight that are quantised or expanded at a time, so that their float32 copies stay small.
ROWS = 1024

Parts = Mapping[str, torch.Tensor]


class Format(Protocol):
    """How stored parts make up a tensor's values."""

    @property
    def name(self) -> str:
        """The format in words."""

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values, computed in float32, in a dtype."""

    def rows(self, parts: Parts, indices: torch.Tensor) -> "QuantizedTensor":
        """Return some rows of a matrix."""


@dataclass(frozen=True)
class ScaledNumbers:
    """Float8 or int8 numbers, kept as bytes, times a scale."""

    kind: torch.dtype  # of the numbers
    groups: int | None  # groups of inputs, each with its scale; None: one scale for all

    @property
    def name(self) -> str:
        """The format in words: "fp8", "int8, 40 groups"."""
        kind = _NAMES.get(self.kind, str(self.kind).removeprefix("torch."))
        if self.groups is None:
            return f"{kind}, one scale"
        return kind if self.groups == 1 else f"{kind}, {self.groups} groups"

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values: products in float32, rounded once to a dtype."""
        data, scale = parts["data"], parts["scale"]
        if dtype in HALF and data.device.type in FLOAT32_FIRST and not torch.compiler.is_compiling():
            return self._expanded_by_rows(data.view(self.kind), scale, dtype)
        # The numbers are exact in the half dtypes, and an in-place product with a float32 tensor of at least
        # one dimension is computed in float32 and rounded once: the same values, a third of the traffic.
        direct = dtype in HALF and data.device.type not in FLOAT32_FIRST
        by_hand = torch.compiler.is_compiling() and self.kind in FLOAT8 and not compiles_float8(data.device)
        numbers = float8_numbers(data, self.kind) if by_hand else data.view(self.kind)
        return self._scaled(numbers.to(dtype if direct else torch.float32), scale).to(dtype)

    def _expanded_by_rows(self, data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Expand by float32 copies of a few rows at a time, not of the whole weight."""
        values = torch.empty(data.shape, dtype=dtype, device=data.device)
        for start in range(0, len(data), ROWS):
            part = slice(start, start + ROWS)
            own = scale if self.groups is None else scale[part]
            values[part] = self._scaled(data[part].to(torch.float32), own)
        return values

    def _scaled(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Multiply rows by their scales, in place."""
        if self.groups is None:
            return values.mul_(scale.reshape(1))
        values.view(len(values), self.groups, math.prod(values.shape[1:]) // self.groups).mul_(scale)
        return values

    def rows(self, parts: Parts, indices: torch.Tensor) -> "QuantizedTensor":
        """Return some rows of a matrix."""
        data, scale = parts["data"][indices], parts["scale"]
        chosen = scale if self.groups is None else scale[indices]
        return QuantizedTensor(tuple(data.shape), self, {"data": data, "scale": chosen})


@dataclass(frozen=True)
class ScaledTiles:
    """Int8 numbers of a matrix, kept as bytes, times a scale for each tile of outputs and inputs.

    Source: TurboDiffusion turbodiffusion/ops/core.py, Int8Linear.
    """

    tile: tuple[int, int] = (128, 128)  # rows and columns; the last ones may be cut off

    @property
    def name(self) -> str:
        """The format in words."""
        return f"int8, tiles of {self.tile[1]}"

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values "o i": products in float32, rounded once to a dtype."""
        data, height = parts["data"], self.tile[0]
        factors = parts["scale"].repeat_interleave(self.tile[1], 1)[:, : data.shape[1]]  # of tiles, "… i"
        if torch.compiler.is_compiling():  # into one kernel
            return self._scaled(data, factors).to(dtype)
        values, tiles = torch.empty(data.shape, dtype=dtype, device=data.device), ROWS // height
        for i in range(0, len(factors), tiles):  # so that the float32 copies stay small
            part = slice(i * height, (i + tiles) * height)
            values[part] = self._scaled(data[part], factors[i : i + tiles])
        return values

    def _scaled(self, data: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        values, whole = data.view(torch.int8).float(), len(data) // self.tile[0]
        inside = values[: whole * self.tile[0]]
        inside.view(whole, self.tile[0], values.shape[1]).mul_(factors[:whole, None])
        values[len(inside) :].mul_(factors[-1])
        return values

    def rows(self, parts: Parts, indices: torch.Tensor) -> "QuantizedTensor":
        """Return some rows of a matrix."""
        data, scale = parts["data"][indices], parts["scale"][indices // self.tile[0]]
        chosen = replace(self, tile=(1, self.tile[1]))
        return QuantizedTensor(tuple(data.shape), chosen, {"data": data, "scale": scale})


@dataclass(frozen=True)
class GgufBlocks:
    """Blocks of GGUF; a ValueError says which types can be read."""

    kind: str  # such as "Q4_K"
    shape: tuple[int, ...]  # of the values

    @property
    def name(self) -> str:
        """The type of the blocks, as GGUF calls it."""
        return self.kind

    def __post_init__(self) -> None:
        _ = self._reader  # raises now rather than at the first call

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values, computed in float32, in a dtype."""
        block, size, function = self._reader
        values = function(parts["data"].reshape(-1, size), block, size, dtype=torch.float32)
        return values.reshape(self.shape).to(dtype)

    def rows(self, parts: Parts, indices: torch.Tensor) -> "QuantizedTensor":
        """Return some rows of a matrix; blocks do not reach from one into the next."""
        shape = (len(indices), *self.shape[1:])
        data = parts["data"].reshape(self.shape[0], -1)[indices]
        return QuantizedTensor(shape, replace(self, shape=shape), {"data": data})

    @cached_property
    def _reader(self) -> tuple[int, int, Callable[..., torch.Tensor]]:
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions

        number = gguf.GGMLQuantizationType[self.kind]
        if number not in dequantize_functions:
            known = ", ".join(sorted(n.name for n in dequantize_functions))
            raise ValueError(f"blocks of type {self.kind} cannot be read; these can: {known}")
        return *gguf.GGML_QUANT_SIZES[number], dequantize_functions[number]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in fewer bytes than its values."""

    shape: tuple[int, ...]  # of the values
    format: Format  # how the stored parts make up the values
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def is_meta(self) -> bool:
        """Whether it has no values."""
        return any(part.is_meta for part in self.parts.values())

    def rows(self, indices: torch.Tensor) -> "QuantizedTensor":
        """Return the rows "n …" with these indices "n"."""
        return self.format.rows(self.parts, indices)


def float8_numbers(data: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Return float8 numbers, given as bytes, in float32: by integers alone, for compilers without float8.

    Shifted into place, a number's bits are those of a float16, with the exponent's bias off by 8 for e4m3.
    """
    bits = data.to(torch.int32)
    if kind == torch.float8_e5m2:
        return (bits << 8).to(torch.int16).view(torch.float16).float()
    rest = bits & 0x7F
    shifted = ((bits & 0x80) << 8) | (rest << 7)
    numbers = shifted.to(torch.int16).view(torch.float16).float() * 256
    return torch.where(rest == 0x7F, torch.nan, numbers)


def scaled_numbers(
    rows: torch.Tensor, kind: torch.dtype, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes "o i" and the scales "o g 1" of rows "o i" of a weight, rounded to float8 or int8."""
    values = rows.float().unflatten(1, (groups, -1))
    largest = torch.linalg.vector_norm(values, float("inf"), dim=2, keepdim=True)
    scale = (largest / LARGEST[kind]).clamp_min(torch.finfo(torch.float32).tiny)  # zeros have any scale
    values = values / scale
    if not kind.is_floating_point:
        values.round_()
    return values.flatten(1).to(kind).view(torch.uint8), scale


def scaled_tensor(data: torch.Tensor, scale: torch.Tensor | None) -> QuantizedTensor:
    """Return a float8 or int8 tensor times a scale: one number, or one per output, "o" or "o 1 …".

    Data "o i" may also have one per group of an output's inputs, "o g 1". A ValueError says that a scale has
    another shape, is not finite, or is the only one and zero.
    """
    scale = torch.ones(()) if scale is None else scale.float()
    shape, groups = tuple(data.shape), None
    if not scale.isfinite().all() or (scale.numel() == 1 and not scale.any()):
        raise ValueError("its scale is zero, or not finite")
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif shape[:1] == scale.shape[:1] and scale.numel() == shape[0] and scale.ndim <= len(shape):
        scale, groups = scale.reshape(-1, 1, 1), 1
    elif (
        (len(shape), scale.ndim) == (2, 3)
        and scale.shape[::2] == (shape[0], 1)
        and scale.shape[1] > 0
        and not shape[1] % scale.shape[1]
    ):
        groups = scale.shape[1]
    else:
        raise ValueError(
            f"the scale has shape {tuple(scale.shape)}; a weight of shape {shape} may have one number, or "
            "one per output or per group of an output's inputs"
        )
    parts = {"data": data.view(torch.uint8), "scale": scale}
    return QuantizedTensor(shape, ScaledNumbers(data.dtype, groups), parts)


def scaled_tiles(data: torch.Tensor, scale: torch.Tensor) -> QuantizedTensor:
    """Return an int8 matrix "o i" times a scale per tile; a ValueError says that the scales do not fit."""
    format = ScaledTiles()
    if data.dtype != torch.int8 or data.ndim != 2 or not data.numel():
        raise ValueError(f"numbers of shape {tuple(data.shape)} in {data.dtype} are no int8 matrix")
    tiles = tuple(-(-size // tile) for size, tile in zip(data.shape, format.tile, strict=True))
    if tuple(scale.shape) != tiles or not scale.is_floating_point():
        kind = f"{scale.dtype} of shape {tuple(scale.shape)}"
        raise ValueError(f"its scales are {kind}, not one per tile, {tiles}")
    if not scale.isfinite().all():
        raise ValueError("its scale is zero, or not finite")
    parts = {"data": data.view(torch.uint8), "scale": scale.float()}
    return QuantizedTensor(tuple(data.shape), format, parts)


def on_meta(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor | QuantizedTensor:
    """Return a tensor of the same shape, dtype or format without its values."""
    if isinstance(tensor, QuantizedTensor):
        parts = {name: torch.empty_like(part, device="meta") for name, part in tensor.parts.items()}
        return QuantizedTensor(tensor.shape, tensor.format, parts)
    return torch.empty_like(tensor, device="meta")


def unflattened(
    tensor: torch.Tensor | QuantizedTensor, shape: tuple[int, ...] | None
) -> torch.Tensor | QuantizedTensor:
    """Return a tensor of GGUF in its shape, if its own comes from merging neighbouring axes of that one.

    Axes with one entry are left out in such files, too. Anything else is returned as it is, also what
    would be a matrix: its two axes are within what GGUF has room for.
    """
    own = tuple(tensor.shape)
    if shape in (None, own) or math.prod(own) != math.prod(shape):
        return tensor
    if len(own) > len(shape) or (len(shape) == 2 and 1 not in shape):
        return tensor
    if not set(accumulate(own, operator.mul)) <= {1, *accumulate(shape, operator.mul)}:
        return tensor
    if isinstance(tensor, torch.Tensor):
        return tensor.reshape(shape)
    if not isinstance(tensor.format, GgufBlocks):
        return tensor
    return replace(tensor, shape=shape, format=replace(tensor.format, shape=shape))


def expanded(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    """Return a tensor as an ordinary one, a quantised one in float32."""
    if not isinstance(tensor, QuantizedTensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, device="meta")
    return tensor.format.expand(tensor.parts)
