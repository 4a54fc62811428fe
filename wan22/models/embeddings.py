"""Embeddings of what conditions the transformer: timesteps, text tokens and image tokens.

Shapes: b batch, s text or image tokens, k timesteps per sample, d model size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .layers import FeedForward, Float32LayerNorm, Float32Linear
from .rope import float64_device


class ConditionEmbedder(nn.Module):
    """Embeds timesteps, text tokens and image tokens into the model's size."""

    def __init__(
        self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None, pos_embed_seq_len: int | None
    ) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim, Float32Linear, "silu")
        self.time_proj = Float32Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim, nn.Linear, "gelu_tanh")
        self.image_embedder = (
            ImageEmbedder(image_dim, dim, pos_embed_seq_len) if image_dim is not None else None
        )

    def embed_time(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed noise levels "b" or "b k" in `dtype`: embedding "b k d", blocks' modulation "b k 6 d"."""
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        temb = self.time_embedder(sinusoidal_embedding(timestep, self.freq_dim).to(dtype))
        return temb, rearrange(self.time_proj(F.silu(temb)), "b k (six d) -> b k six d", six=6)

    def embed_image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed CLIP tokens "b s image_dim" to "b s d"."""
        if self.image_embedder is None:
            raise ValueError(
                "encoder_hidden_states_image was given, but this transformer takes none (image_dim is None)"
            )
        return self.image_embedder(tokens)


class TwoLayers(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_dim: int, dim: int, linear: type[nn.Linear], activation: str) -> None:
        super().__init__()
        self.linear_1 = linear(in_dim, dim)
        self.linear_2 = linear(dim, dim)
        self.activation = nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map "… in_dim" to "… d"."""
        return self.linear_2(self.activation(self.linear_1(x)))


class ImageEmbedder(nn.Module):
    """Embeds the CLIP tokens of Wan 2.1 I2V; with learned positions, of a first and a last frame (FLF)."""

    def __init__(self, in_dim: int, dim: int, pos_embed_seq_len: int | None) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(in_dim)
        self.ff = FeedForward(in_dim, in_dim, dim, approximate="none")
        self.norm2 = Float32LayerNorm(dim)
        self.pos_embed = None
        if pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, pos_embed_seq_len, in_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map "b s image_dim" to "b s d"; with positions, two images "(b 2) s/2 image_dim" to "b s d"."""
        dtype = x.dtype
        if self.pos_embed is not None:
            x = x.reshape(-1, self.pos_embed.shape[1], x.shape[-1]) + self.pos_embed
        return self.norm2(self.ff(self.norm1(x).to(dtype))).to(dtype)


def sinusoidal_embedding(position: torch.Tensor, dim: int) -> torch.Tensor:
    """Map positions "…" to "… dim", cosines, then sines, in float64 (rounded on devices without it).

    `dim` is even. Source: Wan2.2 wan/modules/model.py, sinusoidal_embedding_1d.
    """
    build = float64_device(position.device)
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=build) / (dim // 2)
    angles = position.to(build).to(torch.float64)[..., None] * 10000.0**-exponents
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return embedding if build == position.device else embedding.to(position.device, torch.float32)
