"""Flow matching: from clean latents x0 and noise e to the loss of a predicted velocity.

    x = (1 - sigma) x0 + sigma e        the noisy latents
    v = e - x0                          the velocity that the transformer is to predict
    loss = mean (model(x, 1000 sigma, text) - v)^2

Shapes: b samples, c channels, t h w latent frames, rows, columns, s text tokens, l image tokens, d a width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .timesteps import Timesteps

WEIGHTINGS = ("none", "bell")


@dataclass(frozen=True)
class Batch:
    """Samples of one size, and what is given beside their noisy latents."""

    latents: torch.Tensor  # x0, normalised as for inference, "b c t h w"
    text: torch.Tensor  # "b s d", in the dtype that the large linear layers run in
    # Channels that no noise is added to, "b c t h w": I2V-A14B's mask and image latents, and Wan 2.1 I2V's.
    condition: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None  # CLIP tokens of Wan 2.1 I2V, "b l d"
    # Of which samples the first latent frame is given, "b", bool: TI2V-5B's images. It has no noise, its
    # tokens have time 0, and it does not count.
    first_given: torch.Tensor | None = None


def losses(model: Any, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return the loss of each sample, "b", float32 or wider.

    Args:
        model: the transformer.
        batch: the samples.
        noise: e, "b c t h w".
        sigma: noise levels "b", float64, above 0.
    Source: Wan 2.1 technical report, arXiv 2503.20314, section 4.2.
    """
    x0 = batch.latents
    levels = sigma[:, None].repeat(1, x0.shape[2])  # b t
    if batch.first_given is not None:
        levels[batch.first_given, 0] = 0
    s = levels[:, None, :, None, None].to(x0.dtype)
    x = (1 - s) * x0 + s * noise
    if batch.condition is not None:
        x = torch.cat((x, batch.condition), dim=1)
    times = 1000 * (sigma if batch.first_given is None else levels)
    images = {} if batch.image_embeds is None else {"encoder_hidden_states_image": batch.image_embeds}
    (velocity,) = model(x, times, batch.text, return_dict=False, **images)
    error = (velocity - (noise - x0)).square().mean(dim=(1, 3, 4))  # b t
    counts = (levels > 0).to(error.dtype)
    return (error * counts).sum(dim=1) / counts.sum(dim=1)


def weights_of(weighting: str, sigma: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
    """Return the factor of each sample's loss, "b"; over the distribution of noise levels its mean is 1.

    Args:
        weighting: "none": 1; "bell": most in the middle, 0 at the ends.
        sigma: noise levels, "b".
        timesteps: their distribution.
    Source: "bell" is DiffSynth-Studio's, exp(-2 (sigma - 1/2)^2) less its value at the ends.
    """
    if weighting == "none":
        return torch.ones_like(sigma)
    shares = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    return _bell(sigma) / _bell(timesteps.within(shares)).mean().to(sigma.device)


def _bell(sigma: torch.Tensor) -> torch.Tensor:
    return torch.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)
