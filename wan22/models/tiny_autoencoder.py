"""The decoder of a tiny autoencoder (TAEHV): latents to pixels by 2D convolutions that see one frame back.

Shapes: `c` channels, `t h w` frames, rows, columns. Inside, frames come first: "t c h w".

Names of the parameters are those of the files `taew2_1` and `taew2_2`, `decoder.N…`.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Memory = dict[int, Tensor]  # the last frame that each memory block saw, "1 c h w"


class TinyDecoder(nn.Module):
    """Decodes normalised latents well enough for a preview, in a small part of the VAE's time and memory.

    Args:
        latent_channels: 16 for taew2_1 (Wan 2.1, and Wan 2.2 A14B), 48 for taew2_2 (Wan 2.2 5B).
        patch_size: side of the pixel squares that the last layer's channels unfold into; 2 in taew2_2.
        widths: channels of the four resolutions.
        frame_factors: growth in frames at each of the three steps up.

    Source: madebyollin/taehv taehv.py, TAEHV.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        widths: Sequence[int] = (256, 128, 64, 64),
        frame_factors: Sequence[int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU()]
        for i, factor in enumerate(frame_factors):
            layers += [MemoryBlock(widths[i]) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), MoreFrames(widths[i], factor)]
            layers += [_conv(widths[i], widths[i + 1], bias=False)]
        layers += [nn.ReLU(), _conv(widths[-1], 3 * patch_size**2)]
        self.decoder = nn.Sequential(*layers)
        self.latent_channels, self.patch_size = latent_channels, patch_size
        self.temporal_stride = 1
        for factor in frame_factors:
            self.temporal_stride *= factor

    def forward(self, z: Tensor) -> Tensor:
        """Decode normalised latents "c t h w" of one video to pixels "3 t h w" in [0, 1].

        There are 1 + temporal_stride * (t - 1) frames.
        """
        return torch.cat(list(self.stream(z)), dim=1)

    def stream(self, z: Tensor) -> Iterator[Tensor]:
        """Iterate over the pixels of `forward`, "3 t h w" per latent frame, in the memory of one."""
        if z.ndim != 4 or z.shape[0] != self.latent_channels or 0 in z.shape:
            raise ValueError(
                f"latents have shape {tuple(z.shape)}; they must be ({self.latent_channels}, t, h, w)"
            )
        return self._stream(z)

    def _stream(self, z: Tensor) -> Iterator[Tensor]:
        memory: Memory = {}
        for i in range(z.shape[1]):
            frames, memory = self.decode_next(z[:, i][None], memory)
            # The first latent frame is one frame: the last of those that it becomes.
            yield (frames if i else frames[-1:]).transpose(0, 1)

    def decode_next(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode a clip's next latent frames "t c h w" to "t 3 h w" in [0, 1], temporal_stride for each.

        Takes and returns the memory for the next call; it is empty at the clip's start.
        """
        seen: Memory = {}
        for i, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                seen[i] = x[-1:]
                x = layer(x, memory.get(i))
            else:
                x = layer(x)
        return F.pixel_shuffle(x, self.patch_size).clamp(0, 1), seen


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = _conv(2 * width, width), _conv(width, width), _conv(width, width)
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """Map "t c h w" to "t c h w"; before is the frame that precedes x, None for a black one."""
        before = torch.zeros_like(x[:1]) if before is None else before
        past = torch.cat([before, x[:-1]])
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class MoreFrames(nn.Module):
    """A 1x1 convolution whose output channels belong to `factor` consecutive frames."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map "t c h w" to "(t factor) c h w"."""
        return rearrange(self.conv(x), "t (f c) h w -> (t f) c h w", f=self.factor)


class SoftClamp(nn.Module):
    """Keeps values within -3 and 3, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        """Map values of any shape."""
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
