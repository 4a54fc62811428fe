"""Rotary position embedding over the three axes of a video: frames, rows, columns.

Shapes: b batch, l tokens, n heads, d head size; t h w the grid of tokens.
"""

import torch

# Cosine and sine, "1 l 1 d/2".
RotaryTables = tuple[torch.Tensor, torch.Tensor]

THETA = 10000.0
# Types of devices that have no float64, or not all of them: what needs it is computed on the CPU.
WITHOUT_FLOAT64 = ("mps", "npu", "xpu")


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 is computed for a device: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head that the frame, the row and the column rotate (44, 42, 42 of 128)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotary_tables(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine, "1 l 1 d/2", of the rotation angles of a grid of tokens along t, h, w.

    The angles are float64 whatever the dtype: in float32, frame 20's is off by 1e-6. `head_dim` is even and
    at least 6. Source: Wan2.2 wan/modules/model.py, rope_params and rope_apply.
    """
    build = float64_device(device)
    tables: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for axis, (length, size) in enumerate(zip(grid, axis_sizes(head_dim), strict=True)):
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device=build) / size
        positions = torch.arange(length, dtype=torch.float64, device=build)
        angles = positions[:, None] * THETA**-exponents
        shape = [1, 1, 1, angles.shape[1]]
        shape[axis] = length
        for parts, values in zip(tables, (angles.cos(), angles.sin()), strict=True):
            parts.append(values.to(device, dtype).view(shape).expand(*grid, -1))
    # t h w d/2 -> 1 l 1 d/2
    cos, sin = (torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None] for parts in tables)
    return cos, sin


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rotate each adjacent pair of channels of x "b l n d" by its token's angle, from `rotary_tables`.

    The result is in `dtype`, or in that of x.
    """
    dtype = x.dtype if dtype is None else dtype
    pairs = x.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling() and x.device.type != "mps":
        # A complex product is one pass over x; the compiler has no code for it, and fuses the products below.
        product = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        return torch.view_as_real(product).flatten(-2).to(dtype)
    even, odd = pairs.unbind(-1)
    # Rounded before they are stacked: the compiler would write a stack in the wider dtype, and read it again.
    pair = (even * cos - odd * sin).to(dtype), (even * sin + odd * cos).to(dtype)
    return torch.stack(pair, dim=-1).flatten(-2)
