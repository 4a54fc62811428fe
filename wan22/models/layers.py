"""Layers of the transformer that compute in float32 or wider, whatever dtype their weights are stored in.

The official model runs under bf16 autocast, with the residual stream, normalisation, time embedding,
modulation and head in float32. Rounding any of them to bf16 costs more accuracy than all the bf16 matrix
products together.

Shapes: b batch, l tokens, k timesteps per sample (1, or one for each of k equal runs of tokens), d size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..private_apis import addmm_activation, is_hooked
from .fused import fused, is_fused
from .rope import rotate


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
        return _normalized(input, self.weight, self.bias, self.eps, None, None, None)


class Float32RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation of the last dimension in float32 or wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise "… c"; the result is float32 or wider."""
        return _rms_normalized(x, self.weight, self.eps, None, None, None)


# A norm and what follows it are one kernel, unless something else has a hook between them.


def normalized(
    norm: nn.Module,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Normalise tokens "b l d", and modulate them by the timestep's scale and shift "b k d", if given.

    The result is in `dtype`, or float32 or wider.
    """
    if isinstance(norm, Float32LayerNorm) and not is_hooked(norm):
        return _normalized(x, norm.weight, norm.bias, norm.eps, scale, shift, dtype)
    return _finished(norm(x), scale, shift, dtype)


def added_and_normalized(
    norm: nn.Module,
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens "b l d" plus their update, times a gate "b k d" if given, and that as `normalized`."""
    if isinstance(norm, Float32LayerNorm) and not is_hooked(norm):
        weights = norm.weight, norm.bias, norm.eps
        return _added_and_normalized(x, update, gate, *weights, scale, shift, dtype)
    x = _added(x, update, gate)
    return x, _finished(norm(x), scale, shift, dtype)


def rms_normalized(
    norm: nn.Module, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Normalise queries or keys "b l (n d)", and rotate the heads by `rope.rotary_tables`, if given.

    The result is in the dtype of x, rounded once.
    """
    cos, sin = (None, None) if rotary is None else rotary
    if isinstance(norm, Float32RMSNorm) and not is_hooked(norm):
        return _rms_normalized(x, norm.weight, norm.eps, cos, sin, x.dtype)
    return _rotated(norm(x), cos, sin, x.dtype)


@fused
def _normalized(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    x = x.to(at_least_float32(x.dtype))
    x = F.layer_norm(x, x.shape[-1:], _cast(weight, x.dtype), _cast(bias, x.dtype), eps)
    if scale is not None and shift is not None:
        x = modulate(x, scale, shift)  # here, for a call would keep what it is given in memory
    return x if dtype is None else x.to(dtype)


@fused
def _added_and_normalized(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _added(x, update, gate)
    return x, _normalized(x, weight, bias, eps, scale, shift, dtype)


@fused
def _rms_normalized(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    x = x.to(at_least_float32(x.dtype))
    x = F.rms_norm(x, x.shape[-1:], _cast(weight, x.dtype), eps)
    return _rotated(x, cos, sin, dtype)


def _finished(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor:
    if scale is not None and shift is not None:
        x = modulate(x, scale, shift)
    return x if dtype is None else x.to(dtype)


def _rotated(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor:
    if cos is None or sin is None:
        return x if dtype is None else x.to(dtype)
    return rotate(x.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin, dtype).flatten(-2)


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scale and shift tokens "b l d" by the timestep's "b k d": x * (1 + scale) + shift."""
    runs = x.unflatten(1, (scale.shape[1], -1))  # b (k r) d -> b k r d
    return torch.addcmul(shift[:, :, None], runs, (1 + scale)[:, :, None]).flatten(1, 2)


@fused
def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Add tokens "b l d" times the timestep's gate "b k d": x + y * gate, in x's dtype."""
    runs, gated = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, y))
    return torch.addcmul(runs, gated, gate[:, :, None]).flatten(1, 2)


def _added(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x + y if gate is None else add_gated(x, y, gate)


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
        if not self._is_epilogue(x):
            return F.gelu(self.proj(x), approximate=self.approximate)
        rows = addmm_activation(self.proj.bias, x.flatten(0, -2), self.proj.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])

    def _is_epilogue(self, x: torch.Tensor) -> bool:
        """Whether the product's kernel may end with the GELU: the same, before its result is rounded.

        Only cuBLASLt's does, by the tanh approximation, in half types and without gradients.
        """
        layer = self.proj
        if not x.is_cuda or torch.version.hip is not None or not is_fused() or self.approximate != "tanh":
            return False
        if type(layer) is not nn.Linear or layer.bias is None or is_hooked(layer):
            return False
        tensors = x, layer.weight, layer.bias
        return (
            x.dtype in (torch.bfloat16, torch.float16)
            and all(tensor.dtype == x.dtype for tensor in tensors)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            and not torch.is_autocast_enabled("cuda")
        )


class Tokens(nn.Module):
    """The tokens "b l d" that blocks are given, as hooks may see and divide them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens."""
        return x


class Head(nn.Module):
    """The step from tokens "b l d" and the time's embedding "b k d" to velocities, as hooks may see it.

    Its parameters are the model's, under their released names.
    """

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor, finish: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Return what `finish` makes of the others."""
        return finish(x, temb)


def unpatchified(x: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> torch.Tensor:
    """Lay out patches "b l (pt ph pw c)" of a grid "t h w" as "b c t h w"."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        x, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
    )
