"""The Wan video autoencoder: pixels to latents and back, the 2.1 and the 2.2 family in one class.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns: pixels in [-1, 1] for a video ("x", 3
channels), latent cells for latents ("z"). A clip of 1 + 4k frames has 1 + k latent frames.

A long clip is processed in chunks; the history of the causal layers is a `TemporalCache` that the caller
holds. The model itself does not change while it runs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checks import check_size
from ..devices import uploaded
from .autoencoder_coders import Decoder3d, Encoder3d
from .autoencoder_memory import MemoryModes
from .layers import at_least_float32
from .temporal_cache import SettledPrefix, TemporalCache, assign_cache_keys, regroup_frames
from .tiling import Tile, blend_tiles

Caches: TypeAlias = Callable[[], TemporalCache]

# Statistics of the 2.1 latents per channel; the config of 2.2 checkpoints has its own.
# Source: Wan2.2 wan/modules/vae2_1.py, Wan2_1_VAE.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


class AutoencoderKLWan(MemoryModes, nn.Module):
    """The video autoencoder of Wan 2.1 (4x8x8, 16 channels) or, by configuration, 2.2 (4x16x16, 48 channels).

    Config names and state-dict keys are those of diffusers' class of the same name.

    Args:
        base_dim: encoder channels at full resolution.
        decoder_base_dim: decoder channels at full resolution; None: base_dim.
        z_dim: channels of a latent.
        dim_mult: channels of each resolution, in multiples of the base, full resolution first.
        num_res_blocks: residual blocks per resolution.
        attn_scales: resolutions with extra attention in the encoder (none in released checkpoints).
        temperal_downsample: whether each step down halves time as well (spelt as in the checkpoints).
        latents_mean, latents_std: statistics of each latent channel.
        is_residual: the 2.2 family.
        in_channels, out_channels: 3 x patch_size^2.
        patch_size: side of the pixel squares that are folded into channels; None: 1.
        scale_factor_temporal, scale_factor_spatial: recorded for pipelines; `temporal_stride` and
            `spatial_stride` are what the layers do.
    Source: Wan2.2 wan/modules/vae2_1.py and vae2_2.py, WanVAE_.
    """

    def __init__(
        self,
        base_dim: int = 96,
        decoder_base_dim: int | None = None,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        latents_mean: Sequence[float] = LATENTS_MEAN,
        latents_std: Sequence[float] = LATENTS_STD,
        is_residual: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int | None = None,
        scale_factor_temporal: int | None = 4,
        scale_factor_spatial: int | None = 8,
    ) -> None:
        super().__init__()
        shared = (dim_mult, num_res_blocks)
        down, up = temperal_downsample, temperal_downsample[::-1]
        self.encoder = Encoder3d(
            in_channels, z_dim * 2, base_dim, *shared, attn_scales, down, dropout, is_residual
        )
        self.quant_conv = nn.Conv3d(z_dim * 2, z_dim * 2, 1)
        self.post_quant_conv = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d(
            z_dim, out_channels, decoder_base_dim or base_dim, *shared, up, dropout, is_residual
        )
        assign_cache_keys(self)

        self.in_channels, self.z_dim, self.patch_size = in_channels, z_dim, patch_size or 1
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        self.temporal_stride, self.spatial_stride = strides(temperal_downsample, dim_mult, self.patch_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self.quant_conv.weight.dtype

    # Chunks: one step through a clip.

    def encode_chunk(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Encode a clip's next frames "b 3 t h w" to "b 2c t h w", which `quant_conv` follows.

        A chunk has 1 + 4k frames at the clip's start and 4k later. The clip's cache is new at its start and
        updated in place; None: x is the whole clip.
        """
        return self.encoder(patchify(x, self.patch_size), cache)

    def decode_chunk(self, z: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """Decode a clip's next latents "b c t h w", from `post_quant_conv`, to "b 3 t h w", not clamped.

        The cache is the clip's, as in `encode_chunk`.
        """
        return unpatchify(self.decoder(z, cache), self.patch_size)

    # Clips.

    def encode(self, x: Tensor, chunk_latents: int | None = 1, tiled: bool | None = None) -> Tensor:
        """Encode a clip.

        Args:
            x: pixels, "b 3 t h w" in [-1, 1]; t is 1 + 4k, h and w multiples of `spatial_stride`.
            chunk_latents: latent frames to compute at a time; None: all. Changes memory, not the result.
            tiled: whether to compute in tiles; None: if that is enabled.
        Returns: moments of the raw (not normalised) latents, "b 2c t h w": mean and log variance.
        """
        self._check_video(x)
        self._check_frame_count(x.shape[2])
        self._check_chunk_latents(chunk_latents)
        s = self.spatial_stride
        tiles = self._tiles(x.shape[0], x.shape[3] // s, x.shape[4] // s, tiled)
        return blend_tiles((self._encode_clip(tile.cut(x, s), chunk_latents) for tile in tiles), tiles)

    def decode(self, z: Tensor, chunk_latents: int | None = 1, tiled: bool | None = None) -> Tensor:
        """Decode raw (not normalised) latents "b c t h w" to pixels "b 3 t h w" in [-1, 1].

        `chunk_latents` and `tiled` are as in `encode`.
        """
        self._check_latents(z)
        self._check_chunk_latents(chunk_latents)
        tiles = self._tiles(z.shape[0], z.shape[3], z.shape[4], tiled)
        parts = (self._decode_clip(tile.cut(z), chunk_latents) for tile in tiles)
        return blend_tiles(parts, tiles, self.spatial_stride).clamp(-1, 1)

    def encode_stream(
        self, frames: Iterable[Tensor], chunk_latents: int = 1, caches: Caches = TemporalCache
    ) -> Iterator[Tensor]:
        """Encode a clip that arrives piece by piece, in the memory of one chunk and without gradients.

        Args:
            frames: pieces "b 3 t h w" of the clip in [-1, 1], any number of frames each, 1 + 4k in all.
            chunk_latents: latent frames to compute at a time.
            caches: makes a clip's cache, which says where histories are kept between its chunks.
        Returns: an iterator over the moments of consecutive latents, together those of `encode`; it raises
            ValueError for a piece of another shape, or another sum of frames.
        """
        self._check_chunk_latents(chunk_latents)
        return self._encode_stream(frames, chunk_latents, caches)

    def decode_stream(
        self, z: Tensor, chunk_latents: int = 1, caches: Caches = TemporalCache
    ) -> Iterator[Tensor]:
        """Decode raw latents as `decode`, in the memory of one chunk and without gradients.

        `caches` is as in `encode_stream`.

        Returns: an iterator over consecutive pixels "b 3 t h w", together those of `decode`.
        """
        self._check_latents(z)
        self._check_chunk_latents(chunk_latents)
        return self._decode_stream(z, chunk_latents, caches)

    def forward(self, sample: Tensor) -> Tensor:
        """Encode a clip "b 3 t h w" and decode the mean of its latents."""
        return self.decode(self.encode(sample)[:, : self.z_dim])

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Turn raw latents "b c t h w" into the transformer's: mean 0, deviation 1 per channel; float32."""
        return normalized(z, self.latents_mean, self.latents_std)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Turn the transformer's latents "b c t h w" into raw ones for `decode`; float32."""
        return denormalized(z, self.latents_mean, self.latents_std)

    def _encode_clip(self, x: Tensor, chunk_latents: int | None) -> Tensor:
        if chunk_latents is None or x.shape[2] <= self._chunk_frames(chunk_latents)[0]:
            return self.quant_conv(self._encode_frames(x, self._strips()))
        cache, settled, strips = TemporalCache(), SettledPrefix(), self._strips()
        groups = regroup_frames([x], *self._chunk_frames(chunk_latents))
        chunks = [self._encode_next(x, strips, cache, settled) for x in groups]
        return self.quant_conv(torch.cat(chunks, dim=2))

    def _encode_next(self, x: Tensor, strips: int, cache: TemporalCache, settled: SettledPrefix) -> Tensor:
        """Encode a clip's next chunk; without gradients, layers that would repeat their result do not run."""
        repeats = not torch.is_grad_enabled() and settled.repeats(x)
        return self._encode_frames(x, strips, cache, settled if repeats else None)

    def _encode_frames(
        self, x: Tensor, strips: int, cache: TemporalCache | None = None, settled: SettledPrefix | None = None
    ) -> Tensor:
        x = x.contiguous()  # as in _decode_next
        if settled is None and strips == 1:
            return self.encode_chunk(x, cache)
        return self.encoder(patchify(x, self.patch_size), cache, settled, strips)

    def _decode_clip(self, z: Tensor, chunk_latents: int | None) -> Tensor:
        z, strips = self.post_quant_conv(z), self._strips()
        if chunk_latents is None or z.shape[2] <= chunk_latents:
            return self._decode_next(z, strips, None)
        cache, parts = TemporalCache(), z.split(chunk_latents, dim=2)
        return torch.cat([self._decode_next(part, strips, cache) for part in parts], dim=2)

    def _decode_next(self, z: Tensor, strips: int, cache: TemporalCache | None) -> Tensor:
        # A chunk's strides would tell how long its clip is, which compiled code asks.
        z = z.contiguous()
        if strips == 1:
            return self.decode_chunk(z, cache)
        return unpatchify(self.decoder(z, cache, strips), self.patch_size)

    @torch.no_grad()
    def _encode_stream(
        self, frames: Iterable[Tensor], chunk_latents: int, caches: Caches
    ) -> Iterator[Tensor]:
        s, seen, strips = self.spatial_stride, 0, self._strips()
        states: dict[Tile, tuple[TemporalCache, SettledPrefix]] = {}
        try:
            for x in regroup_frames(frames, *self._chunk_frames(chunk_latents)):
                self._check_video(x)
                seen += x.shape[2]
                self._check_frame_count(seen)
                tiles = self._tiles(x.shape[0], x.shape[3] // s, x.shape[4] // s)
                states = states or {tile: (caches(), SettledPrefix()) for tile in tiles}
                parts = (self._encode_next(tile.cut(x, s), strips, *states[tile]) for tile in tiles)
                yield blend_tiles((self.quant_conv(part) for part in parts), tiles)
        finally:
            for cache, _ in states.values():
                cache.close()

    @torch.no_grad()
    def _decode_stream(self, z: Tensor, chunk_latents: int, caches: Caches) -> Iterator[Tensor]:
        # Once for the clip, which another thread may not know of that enables strips.
        tiles, strips = self._tiles(z.shape[0], z.shape[3], z.shape[4]), self._strips()
        states = {tile: caches() for tile in tiles}
        chunks = zip(
            *(self.post_quant_conv(tile.cut(z)).split(chunk_latents, dim=2) for tile in tiles), strict=True
        )
        try:
            for chunk in chunks:
                pieces = zip(chunk, tiles, strict=True)
                parts = (self._decode_next(x, strips, states[tile]) for x, tile in pieces)
                yield blend_tiles(parts, tiles, self.spatial_stride).clamp(-1, 1)
        finally:
            for cache in states.values():
                cache.close()

    def _chunk_frames(self, chunk_latents: int) -> tuple[int, int]:
        return 1 + self.temporal_stride * (chunk_latents - 1), self.temporal_stride * chunk_latents

    def _check_video(self, x: Tensor) -> None:
        channels = self.in_channels // self.patch_size**2
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"video has shape {tuple(x.shape)}; it must be (b, {channels}, t, h, w)")
        self._check_dtype("video", x)
        check_size("video height", x.shape[3], self.spatial_stride)
        check_size("video width", x.shape[4], self.spatial_stride)

    def _check_frame_count(self, t: int) -> None:
        s = self.temporal_stride
        if (t - 1) % s:
            below = t - (t - 1) % s
            raise ValueError(
                f"video has {t} frames; it must be 1 + a multiple of {s}, such as {below} or {below + s}"
            )

    def _check_latents(self, z: Tensor) -> None:
        channels = self.z_dim
        if z.ndim != 5 or z.shape[1] != channels or 0 in z.shape:
            raise ValueError(f"latents have shape {tuple(z.shape)}; it must be (b, {channels}, t, h, w)")
        self._check_dtype("latents", z)

    def _check_dtype(self, what: str, x: Tensor) -> None:
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{what}: dtype is {x.dtype}; it must be the model's: {what}.to({self.dtype})")

    def _check_chunk_latents(self, chunk_latents: int | None) -> None:
        if chunk_latents is not None and chunk_latents < 1:
            raise ValueError(
                f"chunk_latents is {chunk_latents}; it must be at least 1, or None for the whole clip"
            )


def patchify(x: Tensor, p: int) -> Tensor:
    """Fold p x p squares of pixels into channels."""
    return rearrange(x, "b c t (h p) (w q) -> b (c q p) t h w", p=p, q=p)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """Undo `patchify`."""
    return rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=p, q=p)


def strides(
    temperal_downsample: Sequence[bool], dim_mult: Sequence[int], patch_size: int | None
) -> tuple[int, int]:
    """Return how many frames, and how many rows or columns, of a video make one of its latents."""
    return 2 ** sum(map(bool, temperal_downsample)), 2 ** (len(dim_mult) - 1) * (patch_size or 1)


def strides_of(config: Any) -> tuple[int, int]:
    """Return the strides of an autoencoder, wan22's or diffusers', by its config."""
    return strides(config.temperal_downsample, config.dim_mult, config.patch_size)


def normalized(z: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return raw latents "b c t h w" with mean 0 and deviation 1 per channel, in float32 or wider."""
    shift, scale, z = _statistics(z, mean, std)
    return (z - shift) * scale


def denormalized(z: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo `normalized`."""
    shift, scale, z = _statistics(z, mean, std)
    return z / scale + shift


def _statistics(z: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and reciprocal deviation, "c 1 1 1", and z, in float32 or float64."""
    # float32: the sampler's latents are, and half types would round them once more on each way.
    z = z.to(at_least_float32(z.dtype))
    shift, deviation = uploaded((tuple(mean), tuple(std)), z.dtype, z.device)[..., None, None, None]
    # The official code stores the reciprocal; rounding it first gives the same last bit.
    return shift, 1 / deviation, z
