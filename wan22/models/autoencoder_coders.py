"""Encoder and decoder of the Wan video autoencoder: the layers stacked, resolution by resolution.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns at the block's own resolution.

Like the layers, blocks take any number of frames and a `TemporalCache`, or None for a whole clip.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder_layers import (
    AttentionBlock,
    AverageDown,
    CausalConv3d,
    Downsample,
    DuplicateUp,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from .temporal_cache import SettledPrefix, TemporalCache, Unit
from .tiling import split_strips


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, dropout) for _ in range(2)])

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t h w"."""
        x = self.resnets[0](x, cache)
        x = self.attentions[0](x, cache)
        return self.resnets[1](x, cache)


class ResidualDownBlock(nn.Module):
    """A resolution of the 2.2 encoder: residual blocks, a downsampler, an averaging shortcut around them.

    `spatial` and `temporal` say which axes are halved at its end, and doubled in the decoder's blocks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, dropout: float, spatial: bool, temporal: bool
    ):
        super().__init__()
        self.avg_shortcut = AverageDown(in_channels, out_channels, 2 if temporal else 1, 2 if spatial else 1)
        widths = [in_channels] + [out_channels] * blocks
        self.resnets = _residual_chain(widths, dropout)
        self.downsampler = Downsample(out_channels, temporal) if spatial else None

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t' h' w'"."""
        shortcut = self.avg_shortcut(x)
        for resnet in self.resnets:
            x = resnet(x, cache)
        if self.downsampler is not None:
            x = self.downsampler(x, cache)
        return x + shortcut


class UpBlock(nn.Module):
    """A resolution of the 2.1 decoder: residual blocks, then an upsampler that also halves the channels."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, dropout: float, spatial: bool, temporal: bool
    ):
        super().__init__()
        self.resnets = _residual_chain([in_channels] + [out_channels] * blocks, dropout)
        upsamplers = [Upsample(out_channels, out_channels // 2, temporal)] if spatial else []
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t' h' w'"."""
        return self.enlarge(self.refine(x, cache), cache)

    def refine(self, x: Tensor, cache: TemporalCache | None = None) -> tuple[Tensor, ...]:
        """Run the lower resolution; the result is for `enlarge`."""
        for resnet in self.resnets:
            x = resnet(x, cache)
        return (x,)

    def enlarge(self, refined: tuple[Tensor, ...], cache: TemporalCache | None = None) -> Tensor:
        """Go to the higher resolution, if this is not the highest."""
        (x,) = refined
        for upsampler in self.upsamplers:
            x = upsampler(x, cache)
        return x


class ResidualUpBlock(nn.Module):
    """A resolution of the 2.2 decoder: residual blocks, an upsampler, a duplicating shortcut around them."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, dropout: float, spatial: bool, temporal: bool
    ):
        super().__init__()
        self.resnets = _residual_chain([in_channels] + [out_channels] * blocks, dropout)
        self.upsampler = Upsample(out_channels, out_channels, temporal) if spatial else None
        factor_t = 2 if temporal else 1
        self.avg_shortcut = DuplicateUp(in_channels, out_channels, factor_t, 2) if spatial else None

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t' h' w'"."""
        return self.enlarge(self.refine(x, cache), cache)

    def refine(self, x: Tensor, cache: TemporalCache | None = None) -> tuple[Tensor, ...]:
        """Run the lower resolution; the result is for `enlarge`."""
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        return x, y

    def enlarge(self, refined: tuple[Tensor, ...], cache: TemporalCache | None = None) -> Tensor:
        """Go to the higher resolution, if this is not the highest."""
        x, y = refined
        if self.upsampler is None or self.avg_shortcut is None:
            return y
        return self.avg_shortcut(x, self.upsampler(y, cache), cache)


class Encoder3d(nn.Module):
    """From (patched) pixels to the moments of the latents; the arguments are those of `AutoencoderKLWan`.

    `attn_scales` are fractions of the full resolution, with attention after each residual block (2.1 only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        attn_scales: Sequence[float],
        temporal_downsample: Sequence[bool],
        dropout: float,
        is_residual: bool,
    ):
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, base_dim)
        self.down_blocks = nn.ModuleList()
        width = base_dim
        for level, multiple in enumerate(dim_mult):
            previous, width = width, base_dim * multiple
            spatial = level < len(dim_mult) - 1
            temporal = spatial and temporal_downsample[level]
            if is_residual:
                block = ResidualDownBlock(previous, width, num_res_blocks, dropout, spatial, temporal)
                self.down_blocks.append(block)
                continue
            for _ in range(num_res_blocks):
                self.down_blocks.append(ResidualBlock(previous, width, dropout))
                if 0.5**level in attn_scales:
                    self.down_blocks.append(AttentionBlock(width))
                previous = width
            if spatial:
                self.down_blocks.append(Downsample(width, temporal))
        self.mid_block = MidBlock(width, dropout)
        self.norm_out = RMSNorm(width)
        self.conv_out = CausalConv3d(width, out_channels)

    def forward(
        self, x: Tensor, cache: TemporalCache | None = None, settled: SettledPrefix | None = None
    ) -> Tensor:
        """Map pixels "b c t h w" to moments "b 2c t' h' w'"; `settled` is for a chunk like the last one."""
        units: tuple[Unit, ...] = (self.conv_in, *self.down_blocks, self.mid_block, self._head)
        if settled is not None and cache is not None:
            return settled.run(units, x, cache)
        for unit in units:
            x = unit(x, cache)
        if cache is not None:
            cache.started = True
        return x

    def _head(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(x), inplace=True), cache)


class Decoder3d(nn.Module):
    """From latents to (patched) pixels; the arguments are those of `AutoencoderKLWan`.

    `temporal_upsample` starts with the lowest resolution, and each resolution has one more residual block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        temporal_upsample: Sequence[bool],
        dropout: float,
        is_residual: bool,
    ):
        super().__init__()
        widths = [base_dim * multiple for multiple in reversed(dim_mult)]
        self.conv_in = CausalConv3d(in_channels, widths[0])
        self.mid_block = MidBlock(widths[0], dropout)
        self.up_blocks = nn.ModuleList()
        previous = widths[0]
        for level, width in enumerate(widths):
            spatial = level < len(widths) - 1
            temporal = spatial and temporal_upsample[level]
            block = ResidualUpBlock if is_residual else UpBlock
            self.up_blocks.append(block(previous, width, num_res_blocks + 1, dropout, spatial, temporal))
            # The 2.1 upsampler halves its channels.
            previous = width if is_residual else width // 2
        self.norm_out = RMSNorm(width)
        self.conv_out = CausalConv3d(width, out_channels)

        # Rows beyond its own that `_upper` depends on, one per 3x3 convolution, counted before the last
        # doubling, if there is one.
        self.strip_scale = 2 if len(widths) > 1 else 1
        rows = 2 * (num_res_blocks + 1) + self.strip_scale
        self.strip_halo = -(-rows // self.strip_scale)

    def forward(
        self, z: Tensor, cache: TemporalCache | None = None, strips: Sequence[TemporalCache] = ()
    ) -> Tensor:
        """Map latents "b c t h w" to pixels "b c t' h' w'".

        `strips` are caches of the horizontal strips that the highest resolution is computed in, top first;
        none: it is computed as a whole. The result is the same, as strips overlap by what they need.
        """
        refined = self._lower(z, cache)
        if strips:
            spans = split_strips(refined[0].shape[3], len(strips), self.strip_halo)
            parts = []
            for own, span in zip(strips, spans, strict=True):
                part = self._upper(tuple(x[:, :, :, slice(*span.seen)] for x in refined), own)
                own.started = True
                start, stop = (self.strip_scale * (row - span.seen[0]) for row in span.rows)
                parts.append(part[:, :, :, start:stop])
            x = torch.cat(parts, dim=3)
        else:
            x = self._upper(refined, cache)
        if cache is not None:
            cache.started = True
        return x

    def _lower(self, z: Tensor, cache: TemporalCache | None) -> tuple[Tensor, ...]:
        """Run all that comes before the last enlargement, which takes far less memory than what follows."""
        x = self.mid_block(self.conv_in(z, cache), cache)
        blocks: list[Any] = list(self.up_blocks[:-1])
        for block in blocks[:-1]:
            x = block(x, cache)
        return blocks[-1].refine(x, cache) if blocks else (x,)

    def _upper(self, refined: tuple[Tensor, ...], cache: TemporalCache | None) -> Tensor:
        blocks: list[Any] = list(self.up_blocks[:-1])
        x = blocks[-1].enlarge(refined, cache) if blocks else refined[0]
        x = self.up_blocks[-1](x, cache)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True), cache)


def _residual_chain(widths: Sequence[int], dropout: float) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(a, b, dropout) for a, b in pairwise(widths)])
