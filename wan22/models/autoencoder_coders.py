"""Encoder and decoder of the Wan video autoencoder: the layers stacked, resolution by resolution.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns at the block's own resolution.

Like the layers, blocks take any number of frames and a `TemporalCache`, or None for a whole clip.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
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
    convolve_normalized,
    rows_of,
)
from .strip_rows import split_rows
from .temporal_cache import SettledPrefix, TemporalCache, Unit

# Doublings of rows and columns that are done in strips: below them a frame takes little memory.
STRIP_LEVELS = 2


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
        self.cache_key = ""

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Map "b c t h w" to "b c t' h' w'"."""
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        if self.downsampler is not None:
            y = self.downsampler(y, cache)
        rows = y.shape[3] * self.avg_shortcut.factor_s
        return y + self.avg_shortcut(rows_of(x, rows, self.cache_key, cache))


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
        # Stages that may be computed in strips, the highest resolutions: how many of the blocks there are at
        # the end of each. Its layers lag by a row per 3x3 convolution, and its downsampler by two.
        self.strip_stages: list[int] = []
        self.strip_lag = 1 + 2 * num_res_blocks + 2
        width = base_dim
        for level, multiple in enumerate(dim_mult):
            previous, width = width, base_dim * multiple
            spatial = level < len(dim_mult) - 1
            temporal = spatial and temporal_downsample[level]
            if is_residual:
                block = ResidualDownBlock(previous, width, num_res_blocks, dropout, spatial, temporal)
                self.down_blocks.append(block)
            else:
                for _ in range(num_res_blocks):
                    self.down_blocks.append(ResidualBlock(previous, width, dropout))
                    if 0.5**level in attn_scales:
                        self.down_blocks.append(AttentionBlock(width))
                    previous = width
                if spatial:
                    self.down_blocks.append(Downsample(width, temporal))
            # Attention sees whole frames.
            attends = not is_residual and 0.5**level in attn_scales
            if spatial and not attends and len(self.strip_stages) == level < STRIP_LEVELS:
                self.strip_stages.append(len(self.down_blocks))
        self.mid_block = MidBlock(width, dropout)
        self.norm_out = RMSNorm(width)
        self.conv_out = CausalConv3d(width, out_channels)

    def forward(
        self,
        x: Tensor,
        cache: TemporalCache | None = None,
        settled: SettledPrefix | None = None,
        strips: int = 1,
    ) -> Tensor:
        """Map pixels "b c t h w" to moments "b 2c t' h' w'".

        `settled` is for a chunk like the last one. `strips` is the number of horizontal strips, at most, that
        each of the highest resolutions is computed in; the result is the same.
        """
        if strips > 1 and cache is None:
            cache = TemporalCache()
        units: list[Unit] = [self.conv_in, *self.down_blocks, self.mid_block, self._head]
        if strips > 1:
            ends = [1 + blocks for blocks in self.strip_stages]
            stages = [units[a:b] for a, b in pairwise([0, *ends])]
            units[: ends[-1] if ends else 0] = [partial(self._in_strips, stage, strips) for stage in stages]
        if settled is not None and cache is not None:
            return settled.run(units, x, cache)
        for unit in units:
            x = unit(x, cache)
        if cache is not None:
            cache.started = True
        return x

    def _in_strips(self, stage: Sequence[Unit], strips: int, x: Tensor, cache: TemporalCache) -> Tensor:
        """Run units that end with a downsampler, whose pairs of rows a strip does not divide."""
        parts = []
        for rows in cache.in_strips(split_rows(x.shape[3], strips, self.strip_lag, 2)):
            part = x[:, :, :, rows]
            for unit in stage:
                part = unit(part, cache)
            parts.append(part)
        return torch.cat(parts, dim=3)

    def _head(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        return convolve_normalized(self.conv_out, self.norm_out, x, cache)


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

        # The block whose enlargement is the first layer that may be computed in strips, and the rows that the
        # result lags behind its input: one for each 3x3 convolution, halved from resolution to resolution.
        self.strip_level = max(len(widths) - 1 - STRIP_LEVELS, 0)
        rows = 1
        for level in reversed(range(self.strip_level, len(widths))):
            if level < len(widths) - 1:
                rows = -(-rows // 2) + 1
            if level > self.strip_level or len(widths) == 1:
                rows += 2 * (num_res_blocks + 1)
        self.strip_lag = rows

    def forward(self, z: Tensor, cache: TemporalCache | None = None, strips: int = 1) -> Tensor:
        """Map latents "b c t h w" to pixels "b c t' h' w'".

        `strips` is the number of horizontal strips, at most, that the highest resolutions are computed in;
        the result is the same.
        """
        refined = self._lower(z, cache)
        if strips > 1:
            cache = TemporalCache() if cache is None else cache
            spans = split_rows(refined[0].shape[3], strips, self.strip_lag)
            parts = (
                self._upper(tuple(x[:, :, :, rows] for x in refined), cache)
                for rows in cache.in_strips(spans)
            )
            x = torch.cat(list(parts), dim=3)
        else:
            x = self._upper(refined, cache)
        if cache is not None:
            cache.started = True
        return x

    def _lower(self, z: Tensor, cache: TemporalCache | None) -> tuple[Tensor, ...]:
        """Run the lowest resolutions, which take far less memory than what follows."""
        x = self.mid_block(self.conv_in(z, cache), cache)
        blocks: list[Any] = list(self.up_blocks[:-1])
        for block in blocks[: self.strip_level]:
            x = block(x, cache)
        return blocks[self.strip_level].refine(x, cache) if blocks else (x,)

    def _upper(self, refined: tuple[Tensor, ...], cache: TemporalCache | None) -> Tensor:
        blocks: list[Any] = list(self.up_blocks[self.strip_level : -1])
        x = blocks[0].enlarge(refined, cache) if blocks else refined[0]
        for block in [*blocks[1:], self.up_blocks[-1]]:
            x = block(x, cache)
        return convolve_normalized(self.conv_out, self.norm_out, x, cache)


def _residual_chain(widths: Sequence[int], dropout: float) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(a, b, dropout) for a, b in pairwise(widths)])
