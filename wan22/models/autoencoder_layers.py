"""Layers of the Wan video autoencoder, one set for the 2.1 and the 2.2 family.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns at the layer's own resolution.

Every layer takes any number of frames and a `TemporalCache`. Without a cache the frames are the whole clip;
with one they continue its clip. The result is the same as that of the whole clip at once. If the cache has
`rows`, the layer gets frames strip by strip, and the results of all strips are those of whole frames.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..private_apis import is_hooked
from . import fused
from .attention import attention
from .layers import at_least_float32
from .temporal_cache import TemporalCache

# Devices whose kernels are slow with operands of two dtypes.
ONE_DTYPE = {"cpu"}


class CausalConv3d(nn.Conv3d):
    """Convolution over the present and earlier frames; before the clip there are zeros.

    It runs in the memory format of its weight, contiguous or channels last. `kernel_size` is at least 2 in
    time, and odd in height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int] = (3, 3, 3)):
        t, h, w = kernel_size
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, h // 2, w // 2))
        self.history = t - 1
        # Whether to leave out products with the zeros before a clip that continues, which rounds sums
        # differently from the official code; `wan22.accel.vae` switches it on.
        self.skips_zeros = False
        self.cache_key = ""

    def forward(self, x: Tensor, cache: TemporalCache | None = None, norm: "RMSNorm | None" = None) -> Tensor:
        """Convolve "b c t h w" to "b c t h w" with the frames before it.

        A norm is applied to x before, and SiLU; `convolve_normalized` says when it is left to this layer.
        """
        h, w = (size // 2 for size in self.kernel_size[1:])
        if h and cache is not None and cache.rows is not None:
            x, h = cache.rows.around(self.cache_key, x, h), 0
        frames = None
        if norm is not None:
            frames = self._with_history(x)
            present = frames[:, :, self.history :]
            norm.write_silu(x, present)
            x = present
        past = None if cache is None else cache.exchange(self.cache_key, x, self.history)
        if past is None and x.shape[2] == 1 and (cache is None or self.skips_zeros):
            # The clip's first frame alone: all taps but the last would read the zeros before it.
            first = x.contiguous(memory_format=self.layout)[:, :, 0]
            return F.conv2d(first, self.weight[:, :, -1], self.bias, padding=(h, w)).unsqueeze(2)
        if frames is None:
            # Written once, in the wanted layout, whatever those of x and past are.
            frames = self._with_history(x)
            frames[:, :, self.history :] = x
        frames[:, :, : self.history] = 0 if past is None else past
        return F.conv3d(frames, self.weight, self.bias, padding=(0, h, w))

    @property
    def layout(self) -> torch.memory_format:
        """The memory format that it runs in."""
        return torch.contiguous_format if self.weight.is_contiguous() else torch.channels_last_3d

    def _with_history(self, x: Tensor) -> Tensor:
        """Return memory for x "b c t h w" and the frames before it, in the layout of the weight."""
        b, c, t, *frame = x.shape
        shape = b, c, self.history + t, *frame
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.layout)


class RMSNorm(nn.Module):
    """Scale each position's channel vector to root mean square 1, then by a learned gain.

    `axes` is the number of axes after the channels: 3 for "b c t h w", 2 for "b c h w".
    """

    def __init__(self, channels: int, axes: int = 3):
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over dimension 1."""
        return _unit_rms(x, self.gamma, self.scale)

    def write_silu(self, x: Tensor, out: Tensor) -> None:
        """Write the norm and SiLU of x "b c t h w", contiguous or with channels innermost, to out."""
        for sample, result in zip(x, out, strict=True):
            read, written = (each.movedim(0, -1).view(1, -1, x.shape[1]) for each in (sample, result))
            _write_unit_rms_silu(read, self.gamma.flatten(), self.scale, written)


def normalized_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise "b c t h w" and apply SiLU: one kernel on a GPU, unless a hook lies between the two."""
    if not isinstance(norm, RMSNorm) or is_hooked(norm) or not fused.applies(x, norm.gamma):
        # A norm's result is a new tensor, so its activation needs no other.
        return F.silu(norm(x), inplace=True)
    # The positions become one axis, whichever is innermost in memory; strips are copied for that.
    rows = x.movedim(1, -1).flatten(1, 3) if x.stride(1) == 1 else x.flatten(2).movedim(1, -1)
    rows = _unit_rms_silu(rows, norm.gamma.flatten(), norm.scale)
    return rows.unflatten(1, x.shape[2:]).movedim(-1, 1)


def convolve_normalized(
    conv: nn.Module, norm: nn.Module, x: Tensor, cache: TemporalCache | None = None
) -> Tensor:
    """Convolve what `normalized_silu` makes of "b c t h w".

    One kernel on a GPU writes it to where the convolution reads, unless a hook or a strip lies between.
    """
    if _writes_directly(conv, norm, x, cache):
        return conv(x, cache, norm)
    return conv(normalized_silu(norm, x), cache)


def _writes_directly(conv: nn.Module, norm: nn.Module, x: Tensor, cache: TemporalCache | None) -> bool:
    if not isinstance(conv, CausalConv3d) or not isinstance(norm, RMSNorm):
        return False
    return (
        not (is_hooked(conv) or is_hooked(norm) or (cache is not None and cache.rows is not None))
        # A single frame may be convolved alone, and takes little memory.
        and x.shape[2] > 1
        and x.is_contiguous(memory_format=conv.layout)
        and fused.applies(x, norm.gamma)
    )


@fused.fused
def _write_unit_rms_silu(x: Tensor, gamma: Tensor, scale: float, out: Tensor) -> None:
    """Write `_unit_rms_silu` of "b p c" to out."""
    y = _unit_rms(x.to(at_least_float32(x.dtype)), gamma, scale, dim=-1)
    out.copy_(F.silu(y))


@fused.fused
def _unit_rms_silu(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """Normalise "b p c" over its last axis and apply SiLU; a result in half types is rounded once."""
    y = _unit_rms(x.to(at_least_float32(x.dtype)), gamma, scale, dim=-1)
    return F.silu(y).to(x.dtype)


def _unit_rms(x: Tensor, gamma: Tensor, scale: float, dim: int = 1) -> Tensor:
    # float32 for half types: a sum of squares overflows float16 and loses digits in bfloat16.
    wide = at_least_float32(x.dtype)
    y = x.to(wide) if x.device.type in ONE_DTYPE else x
    norm = torch.linalg.vector_norm(y, dim=dim, keepdim=True, dtype=wide).clamp_min(1e-12)
    if y.dtype == wide:
        # In place where y is a copy, unless the norm's gradient needs it.
        y = y / norm if y is x or y.requires_grad else y.div_(norm)
        # Three roundings in the official order: folding the two gains costs the last bit of every layer.
        return y.mul_(scale).mul_(gamma).to(x.dtype)
    # A half type keeps nothing of that bit.
    y = y * (scale / norm)
    trained = torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad)
    if trained or torch.compiler.is_compiling():
        return (y * gamma).to(x.dtype)
    return torch.mul(y, gamma, out=torch.empty_like(x))


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after norm and SiLU, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = RMSNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = RMSNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)
        self.cache_key = ""

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t h w"."""
        y = convolve_normalized(self.conv1, self.norm1, x, cache)
        if self.dropout.training and self.dropout.p:
            y = self.conv2(self.dropout(normalized_silu(self.norm2, y)), cache)
        else:
            y = convolve_normalized(self.conv2, self.norm2, y, cache)
        return y.add_(self.conv_shortcut(rows_of(x, y.shape[3], self.cache_key, cache)))


class AttentionBlock(nn.Module):
    """Single-head self-attention among the positions of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t h w"; frames do not see each other, so the cache is unused."""
        b, c, t, h, w = x.shape
        qkv = self.to_qkv(self.norm(_fold_time(x)))
        # Attention kernels want each position's vector contiguous.
        q, k, v = (
            rearrange(qkv, "f (three c) h w -> f (h w) 1 (three c)", three=3).contiguous().chunk(3, dim=-1)
        )
        y = attention(q, k, v).flatten(2).transpose(1, 2)  # (b t) c (h w)
        return _unfold_time(self.proj(y.reshape(b * t, c, h, w)), b) + x


class Downsample(nn.Module):
    """Halve height and width and, if `temporal`, the number of frames after the clip's first."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        # Rows and columns are padded at the end only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        self.cache_key = ""

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t' h/2 w/2"; t' is 1 + (t - 1)/2 at the clip's start and t/2 after it."""
        if cache is not None and cache.rows is not None:
            x = cache.rows.windows(self.cache_key, x)
        x = _unfold_time(self.resample(_fold_time(x)), x.shape[0])
        if self.time_conv is None:
            return x
        past = None if cache is None else cache.exchange(self.cache_key, x, 1)
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))
        # The clip's first frame stands alone; it is also the context of the pair that follows it.
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width and, if `temporal`, the number of frames after the clip's first."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.time_conv = CausalConv3d(in_channels, in_channels * 2, (3, 1, 1)) if temporal else None
        self.cache_key = ""

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t' 2h 2w"; t' is 1 + 2(t - 1) at the clip's start and 2t after it."""
        if self.time_conv is not None:
            if cache is not None and cache.started:
                x = self._double_time(x, cache)
            elif x.shape[2] > 1:
                # The first frame is neither doubled nor seen by the convolution, whose context is zeros then.
                x = torch.cat([x[:, :, :1], self._double_time(x[:, :, 1:], cache)], dim=2)
        if cache is None or cache.rows is None:
            return _unfold_time(self.resample(_fold_time(x)), x.shape[0])
        x = cache.rows.around(self.cache_key, x)
        # The rows around are doubled, too; the convolution's own padding has spoilt the outermost of them.
        return _unfold_time(self.resample(_fold_time(x)), x.shape[0])[:, :, :, 2:-2]

    def _double_time(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        """Map "b c t h w" to "b c 2t h w"; the convolution's channel halves are even and odd frames."""
        even, odd = self.time_conv(x, cache).chunk(2, dim=1)  # type: ignore[misc]
        pairs = zip(even.split(1, dim=2), odd.split(1, dim=2), strict=True)
        return torch.cat([frame for pair in pairs for frame in pair], dim=2)


class AverageDown(nn.Module):
    """Shortcut of a 2.2 down block: pixels become channels, averaged in groups; the factors are 1 or 2."""

    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_s: int):
        super().__init__()
        cell = in_channels * factor_t * factor_s**2
        if cell % out_channels:
            raise ValueError(f"out_channels {out_channels} must divide in_channels x factors = {cell}")
        self.out_channels = out_channels
        self.factor_t = factor_t
        self.factor_s = factor_s

    def forward(self, x: Tensor) -> Tensor:
        """Map "b c t h w" to "b c t/factor_t h/factor_s w/factor_s"."""
        ft, fs = self.factor_t, self.factor_s
        # Only a clip's start has an odd number of frames; its first one is paired with zeros before it.
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
        x = rearrange(x, "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w", ft=ft, fh=fs, fw=fs)
        return x.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class DuplicateUp(nn.Module):
    """Shortcut of a 2.2 up block: channels are repeated and become pixels; factors are 1 or 2."""

    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_s: int):
        super().__init__()
        cell = out_channels * factor_t * factor_s**2
        if cell % in_channels:
            raise ValueError(f"in_channels {in_channels} must divide out_channels x factors = {cell}")
        self.repeats = cell // in_channels
        self.out_channels = out_channels
        self.factor_t = factor_t
        self.factor_s = factor_s
        self.cache_key = ""

    def forward(self, x: Tensor, y: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Add "b c t h w", enlarged, to y "b c t' h*factor_s w*factor_s" in place; t' as in `Upsample`."""
        ft, fs = self.factor_t, self.factor_s
        x = rows_of(x, y.shape[3] // fs, self.cache_key, cache)
        b, _, t, h, w = x.shape
        # Views only: the enlarged tensor is never materialised.
        x = x.unsqueeze(2).expand(-1, -1, self.repeats, -1, -1, -1)
        x = x.reshape(b, self.out_channels, ft, fs, fs, t, h, w)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # b c t ft h fs w fs
        parts = [(x, y)]
        if cache is None or not cache.started:
            # The clip's first frame is not repeated in time.
            parts = [(x[:, :, :1, ft - 1 :], y[:, :, :1]), (x[:, :, 1:], y[:, :, 1:])]
        for small, large in parts:
            large = large.unflatten(4, (w, fs)).unflatten(3, (h, fs)).unflatten(2, small.shape[2:4])
            large.add_(small)
        return y


def rows_of(x: Tensor, count: int, layer: str, cache: TemporalCache | None) -> Tensor:
    """Return the rows of a shortcut "b c t h w" that belong to the next `count` of a result that lags."""
    return x if cache is None or cache.rows is None else cache.rows.first(layer, x, count)


def _fold_time(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")


def _unfold_time(x: Tensor, b: int) -> Tensor:
    return rearrange(x, "(b t) c h w -> b c t h w", b=b)
