"""What the transformer gets beside text: nothing, a given image in channels, or a given first frame.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l image tokens of width d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Condition(Protocol):
    """What a pipeline gives the transformer beside noise and text."""

    def model_inputs(self, video: int, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments for one video's latents "1 c t h w" and a timestep "1"."""
        ...

    def overwrite_known_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents "b c t h w" with the given frames in place: before each step and at the end."""
        ...


class NoCondition:
    """Nothing beside the text: the transformer sees the noisy latents alone."""

    def model_inputs(self, video: int, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments; one timestep serves all tokens, also for TI2V-5B."""
        return {"hidden_states": latents, "timestep": timestep}

    def overwrite_known_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents as they are."""
        return latents


@dataclass(frozen=True)
class ChannelCondition:
    """Given frames in channels beside the noisy ones: I2V-A14B, and Wan 2.1 I2V with CLIP tokens.

    Source: Wan2.2 wan/image2video.py, WanI2V.generate.
    """

    # One per video, "1 c t h w": 4 channels of mask, then latents of a clip of the given frames and zeros.
    channels: Sequence[torch.Tensor]
    # CLIP tokens per video, "1 l d", "2 l d" for first and last frame; None without an image encoder.
    image_embeds: Sequence[torch.Tensor] | None = None

    def model_inputs(self, video: int, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments."""
        inputs = {"hidden_states": torch.cat((latents, self.channels[video]), dim=1), "timestep": timestep}
        if self.image_embeds is not None:
            inputs["encoder_hidden_states_image"] = self.image_embeds[video]
        return inputs

    def overwrite_known_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents as they are: the model itself makes the given frames."""
        return latents


@dataclass(frozen=True)
class FirstFrameCondition:
    """A given first frame that stays in the latents, its tokens at time 0: TI2V-5B.

    Source: Wan2.2 wan/textimage2video.py, WanTI2V.i2v.
    """

    first: torch.Tensor  # latents of the given frames, "b c 1 h w"

    def model_inputs(self, video: int, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments with one timestep per latent frame, "1 t"."""
        times = timestep.repeat_interleave(latents.shape[2])
        times[0] = 0
        return {"hidden_states": latents, "timestep": times[None]}

    def overwrite_known_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """Put the given first frames in front."""
        return torch.cat((self.first.to(latents), latents[:, :, 1:]), dim=2)
