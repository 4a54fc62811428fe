"""NVFP4: numbers of four bits, a float8 scale for 16 of them, and one float32 factor for all.

Sources: comfy-kitchen comfy_kitchen/tensor/nvfp4.py, LightX2V lightx2v_kernel/python/lightx2v_kernel/gemm.py.

Shapes: o outputs, i inputs of a linear layer.
"""

from dataclasses import dataclass, replace

import torch

from .quantized import ROWS, Parts, QuantizedTensor, float8_numbers

BLOCK = 16  # inputs that share a scale
# Scales are stored in tiles of so many rows and columns, as the tensor cores read them: within a tile, row r
# is at (r % 32, r // 32).
_TILE_ROWS, _TILE_COLUMNS, _INTERLEAVED = 128, 4, 32


@dataclass(frozen=True)
class Nvfp4:
    """Pairs of e2m1 numbers in bytes "o i/2", times the scale of their block, times a factor."""

    high_first: bool  # whether the upper four bits are the first number of a pair
    tiled: bool = True  # whether the scales are in tiles

    @property
    def name(self) -> str:
        """The format in words."""
        return "nvfp4"

    def expand(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values "o i": products in float32, rounded once to a dtype."""
        data, scales = parts["data"], self._scales(parts)
        if torch.compiler.is_compiling():  # into one kernel
            return self._scaled(data, scales).to(dtype)
        values = torch.empty(len(data), 2 * data.shape[1], dtype=dtype, device=data.device)
        for start in range(0, len(data), ROWS):  # so that what is between stays small
            part = slice(start, start + ROWS)
            values[part] = self._scaled(data[part], scales[part])
        return values

    def rows(self, parts: Parts, indices: torch.Tensor) -> QuantizedTensor:
        """Return some rows of a matrix."""
        data = parts["data"][indices]
        scale = self._in_order(parts["scale"], *self._grid(parts["data"]))[indices]
        chosen = {"data": data, "scale": scale, "factor": parts["factor"]}
        return QuantizedTensor((len(data), 2 * data.shape[1]), replace(self, tiled=False), chosen)

    def _scaled(self, data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        pair = (data & 15, data >> 4)
        numbers = float4_numbers(torch.stack(pair[:: -1 if self.high_first else 1], -1).flatten(1))
        return (numbers.unflatten(1, (-1, BLOCK)) * scales[..., None]).flatten(1)

    def _scales(self, parts: Parts) -> torch.Tensor:
        """Return the scales "o i/16", with the factor, in float32."""
        scale = self._in_order(parts["scale"], *self._grid(parts["data"]))
        return float8_numbers(scale, torch.float8_e4m3fn) * parts["factor"]

    def _in_order(self, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return scales row by row, without padding."""
        if not self.tiled:
            return scale
        tiles = scale.reshape(-1, _stored(columns, _TILE_COLUMNS) // _TILE_COLUMNS, _INTERLEAVED, 4, 4)
        ordered = tiles.permute(0, 3, 2, 1, 4).reshape(_stored(rows, _TILE_ROWS), -1)
        return ordered[:rows, :columns]

    @staticmethod
    def _grid(data: torch.Tensor) -> tuple[int, int]:
        return len(data), 2 * data.shape[1] // BLOCK


def nvfp4(data: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, high_first: bool) -> QuantizedTensor:
    """Return a weight of such parts; a ValueError says which of them does not fit the others."""
    if data.dtype != torch.uint8 or data.ndim != 2 or 2 * data.shape[1] % BLOCK or not data.numel():
        kind = f"{data.dtype} of shape {tuple(data.shape)}"
        raise ValueError(f"{kind} holds no rows of pairs in blocks of {BLOCK} numbers")
    rows, columns = len(data), 2 * data.shape[1] // BLOCK
    stored = (_stored(rows, _TILE_ROWS), _stored(columns, _TILE_COLUMNS))
    if scale.dtype != torch.float8_e4m3fn or tuple(scale.shape) != stored:
        raise ValueError(
            f"its scales are {scale.dtype} of shape {tuple(scale.shape)}, not float8_e4m3fn of shape {stored}"
        )
    if factor.numel() != 1 or not factor.is_floating_point():
        raise ValueError(f"its factor is {factor.dtype} of shape {tuple(factor.shape)}, not one number")
    if not (factor.isfinite().all() and factor.any()):
        raise ValueError("its factor is zero, or not finite")
    parts = {"data": data, "scale": scale.view(torch.uint8), "factor": factor.float().reshape(())}
    return QuantizedTensor((rows, 2 * data.shape[1]), Nvfp4(high_first), parts)


def has_finite_scales(tensor: QuantizedTensor) -> bool:
    """Whether no scale of an NVFP4 weight is NaN; all of them are read."""
    return not bool((tensor.parts["scale"] & 0x7F == 0x7F).any())


def float4_numbers(codes: torch.Tensor) -> torch.Tensor:
    """Return e2m1 numbers, given as bytes 0 to 15, in float32.

    Shifted into place, a number's bits are those of a float16, with the exponent's bias off by 14.
    """
    bits = codes.to(torch.int16)
    shifted = ((bits & 8) << 12) | ((bits & 7) << 9)
    return shifted.view(torch.float16).float() * 2**14


def _stored(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
