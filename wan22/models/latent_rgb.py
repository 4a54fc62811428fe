"""A quick look at latents: what colour each latent cell has, without decoding.

Shapes: `c` latent channels, `t h w` latent frames, rows, columns; for pixels, frames and cells of them.

`latent_rgb.json` holds one map per family of autoencoders, from normalised latents to colours in [-1, 1];
`fit_latent_rgb` finds such a map by least squares. Those of the released autoencoders are linear; the
miniature's needs products of two latents as well.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_TABLE = Path(__file__).with_suffix(".json")
_DIGITS = 4  # of the table's numbers


@dataclass(frozen=True)
class LatentRGB:
    """A map from latents to colours, linear in them, or in them and their products."""

    name: str  # family of autoencoders
    source: str  # origin of the numbers
    latents_mean: tuple[float, ...]  # per latent channel; with latents_std it identifies the family
    latents_std: tuple[float, ...]
    factors: tuple[tuple[float, ...], ...]  # "3 c", weight of each latent channel in red, green and blue
    bias: tuple[float, ...]  # "3", the colour where all latents are 0
    # "3 c(c+1)/2", weight of each product of two channels, in torch.triu_indices' order; empty if linear
    products: tuple[tuple[float, ...], ...] = ()

    @property
    def channels(self) -> int:
        """Latent channels."""
        return len(self.latents_mean)

    def frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Colour normalised latents "c t h w"; uint8 "t h w 3" on the latents' device."""
        weight, bias = (torch.tensor(v, device=latents.device) for v in (self._weight, self.bias))
        # float32: half-precision latents would show steps in smooth colours.
        features = _features(latents.float().permute(1, 2, 3, 0), bool(self.products))
        rgb = F.linear(features, weight, bias)
        return to_bytes(rgb.add_(1).div_(2))

    @property
    def _weight(self) -> list[tuple[float, ...]]:
        if not self.products:
            return list(self.factors)
        return [row + rest for row, rest in zip(self.factors, self.products, strict=True)]

    def matches(self, mean: Iterable[float], std: Iterable[float]) -> bool:
        """Whether latents have the family's statistics, to the places that are written down."""
        found = tuple(round(float(value), _DIGITS) for value in (*mean, *std))
        return found == (*self.latents_mean, *self.latents_std)


def _features(z: torch.Tensor, products: bool) -> torch.Tensor:
    """Return the map's inputs, "… k": latents "… c", and their products if asked for."""
    if not products:
        return z
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], device=z.device)
    return torch.cat([z, z[..., i] * z[..., j]], dim=-1)


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """Turn [0, 1] into 0 to 255, rounded; what lies outside is clamped."""
    return x.clamp(0, 1).mul_(255).round_().to(torch.uint8)


@lru_cache
def latent_rgb_maps() -> tuple[LatentRGB, ...]:
    """Return the known maps, those of released autoencoders first."""
    entries = json.loads(_TABLE.read_text())
    return tuple(
        LatentRGB(
            name=entry["name"],
            source=entry["source"],
            latents_mean=tuple(entry["latents_mean"]),
            latents_std=tuple(entry["latents_std"]),
            factors=tuple(tuple(row) for row in entry["factors"]),
            bias=tuple(entry["bias"]),
            products=tuple(tuple(row) for row in entry["products"]),
        )
        for entry in entries
    )


def latent_rgb_of(vae: Any) -> LatentRGB:
    """Return the map for an autoencoder's latents; its config has z_dim, latents_mean and latents_std.

    If its statistics are unknown, the map is, with a warning, that of a family with as many channels.

    Raises: ValueError: no family has as many channels.
    """
    config, maps = vae.config, latent_rgb_maps()
    for known in maps:
        if known.matches(config.latents_mean, config.latents_std):
            return known
    for similar in maps:
        if similar.channels == config.z_dim:
            logger.warning(
                "the statistics of this VAE's latents are not known; previews take the colours of %s and may "
                "be off",
                similar.name,
            )
            return similar
    sizes = sorted({known.channels for known in maps})
    nearest = min(sizes, key=lambda size: abs(size - config.z_dim))
    raise ValueError(
        f"the VAE's latents have {config.z_dim} channels; colours are known for those of "
        f"{' and '.join(map(str, sizes))}, nearest is {nearest}"
    )


@torch.no_grad()
def fit_latent_rgb(
    vae: Any, videos: Iterable[torch.Tensor], source: str = "", products: bool = False
) -> tuple[LatentRGB, float]:
    """Find the map from an autoencoder's latents to colours, by least squares.

    Args:
        vae: the autoencoder, in the dtype to encode in.
        videos: clips of uint8 frames "t h w 3", t = 1 + 4k, h and w multiples of the VAE's stride.
        source: description of the videos, for the record.
        products: whether the map may use the products of two latents.
    Returns: the map, rounded to the table's digits; the share of the colours' variance that it explains.
    Raises: ValueError: there are no more latent cells than unknowns per colour.
    """
    channels = vae.config.z_dim
    known = channels + products * channels * (channels + 1) // 2  # features; then a 1, and three colours
    # Sums over all cells of the products of features, 1 and colours with one another: all that a fit needs.
    sums = torch.zeros(known + 4, known + 4, dtype=torch.float64)
    for video in videos:
        x = video.permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype).div(127.5).sub(1)  # 1 3 t h w
        z = vae.normalize_latents(vae.encode(x).latent_dist.mode())[0].double()
        colours = cell_colours(x[0].double(), vae.temporal_stride, vae.spatial_stride)
        ones = torch.ones_like(z[:1])
        columns = (_features(z.flatten(1).T, products), ones.flatten(1).T, colours.flatten(1).T)
        rows = torch.cat(columns, dim=1).cpu()
        sums += rows.T @ rows
    count = int(sums[known, known])
    if count <= known:
        raise ValueError(f"{count} latent cells cannot tell {known} numbers apart; give more images")
    inputs, outputs = slice(0, known + 1), slice(known + 1, None)
    solution = torch.linalg.lstsq(sums[inputs, inputs], sums[inputs, outputs], driver="gelsd").solution.T
    solution = solution.mul(10**_DIGITS).round().div(10**_DIGITS)  # 3 known+1
    wrong = torch.cat([-solution, torch.eye(3, dtype=torch.float64)], dim=1)  # colours less predicted ones
    errors = (wrong @ sums @ wrong.T).trace()
    mean = sums[known, outputs] / count
    spread = sums[outputs, outputs].trace() - count * (mean @ mean)
    table = [tuple(row) for row in solution.tolist()]
    found = LatentRGB(
        name=str(vae.config.get("_name_or_path", "")),
        source=source,
        latents_mean=tuple(vae.config.latents_mean),
        latents_std=tuple(vae.config.latents_std),
        factors=tuple(row[:channels] for row in table),
        bias=tuple(row[known] for row in table),
        products=tuple(row[channels:known] for row in table) if products else (),
    )
    return found, float(1 - errors / spread)


def cell_colours(x: torch.Tensor, temporal_stride: int, spatial_stride: int) -> torch.Tensor:
    """Average pixels "3 t h w" over latent cells; the first latent frame is the first frame alone."""
    cells = F.avg_pool2d(x.transpose(0, 1), spatial_stride)  # t 3 h w
    later = cells[1:].unflatten(0, (-1, temporal_stride)).mean(1)
    return torch.cat([cells[:1], later]).transpose(0, 1)
