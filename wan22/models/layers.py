"""Layers of the transformer that compute in float32 or wider, whatever dtype their weights are stored in.

The official model runs under bf16 autocast, with the residual stream, normalisation, time embedding,
modulation and head in float32. Rounding any of them to bf16 costs more accuracy than all the bf16 matrix
products together.

Shapes: b batch, l tokens, k timesteps per sample (1, or one for each of k equal runs of tokens), d size.
"""

import torch
import torch.nn.functional as F
from torch import nn


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _cast(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(dtype)


class Float32Linear(nn.Linear):
    """A linear layer that computes in its input's dtype, float32 or wider, and never rounds the input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map "… in_features" to "… out_features"."""
        return F.linear(input, self.weight.to(input.dtype), _cast(self.bias, input.dtype))


class Float32LayerNorm(nn.LayerNorm):
    """Layer normalisation of the last dimension in float32 or wider."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise "… c"; the result is float32 or wider."""
        x = input.to(at_least_float32(input.dtype))
        return F.layer_norm(
            x, self.normalized_shape, _cast(self.weight, x.dtype), _cast(self.bias, x.dtype), self.eps
        )


class Float32RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation of the last dimension in float32 or wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise "… c"; the result is float32 or wider."""
        x = x.to(at_least_float32(x.dtype))
        return F.rms_norm(x, self.normalized_shape, _cast(self.weight, x.dtype), self.eps)


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scale and shift tokens "b l d" by the timestep's "b k d": x * (1 + scale) + shift."""
    runs = x.unflatten(1, (scale.shape[1], -1))  # b (k r) d -> b k r d
    return (runs * (1 + scale)[:, :, None]).add_(shift[:, :, None]).flatten(1, 2)


def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Add tokens "b l d" times the timestep's gate "b k d": x + y * gate, in x's dtype."""
    runs, gated = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, y))
    return (gated * gate[:, :, None]).add_(runs).flatten(1, 2)


class FeedForward(nn.Module):
    """Two linear layers around a GELU; the parameter names are diffusers' (`net.0.proj`, `net.2`)."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, approximate: str) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GELU(dim, hidden_dim, approximate), nn.Identity(), nn.Linear(hidden_dim, out_dim)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map "… dim" to "… out_dim"."""
        for layer in self.net:
            x = layer(x)
        return x


class GELU(nn.Module):
    """A linear layer followed by GELU."""

    def __init__(self, dim: int, hidden_dim: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map "… dim" to "… hidden_dim"."""
        return F.gelu(self.proj(x), approximate=self.approximate)
