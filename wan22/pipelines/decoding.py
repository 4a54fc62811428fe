"""From latents to frames, chunk by chunk.

Shapes: b videos, c channels, t h w frames, rows, columns, of latents or pixels.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image

from ..checkpoints.loading.alignment import align_weights
from ..video.result import to_uint8
from .placement import PlacedPipeline


class DecodingPipeline(PlacedPipeline):
    """Decodes latents with the VAE, wherever that is kept and however it is to save memory."""

    @abstractmethod
    def running(self) -> AbstractContextManager[None]:
        """Leave the pipeline ready for the next call, however this one ends."""

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np") -> Any:
        """Decode normalised latents, video by video and chunk by chunk.

        Args:
            latents: "b c t h w".
            output_type: "np", "pt", "pil" or "latent", as in WanVideo.frames.

        Returns: the frames.

        Raises:
            FloatingPointError: the VAE produced values that are not finite.
        """
        if output_type == "latent":
            return latents
        videos = []
        frames = 1 + (latents.shape[2] - 1) * self.vae.temporal_stride
        rows, columns = (length * self.vae.spatial_stride for length in latents.shape[3:])
        with self.progress_bar(total=len(latents) * frames, desc="decoding", unit="frame") as bar:
            for z in latents.split(1):
                video = torch.empty(3, frames, rows, columns)  # c t h w
                done = 0
                for chunk in self.decode_chunks(z):
                    video[:, done : done + chunk.shape[1]] = chunk
                    done += chunk.shape[1]
                    bar.update(chunk.shape[1])
                videos.append(video)
        if output_type == "pt":
            return torch.stack(videos).transpose(1, 2)  # b c t h w -> b t c h w
        arrays = np.stack([video.permute(1, 2, 3, 0).numpy() for video in videos])
        return arrays if output_type == "np" else [[Image.fromarray(f) for f in v] for v in to_uint8(arrays)]

    def decode_chunks(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode one video's normalised latents "1 c t h w" chunk by chunk: "c t h w" in [0, 1], on the CPU.

        Raises:
            FloatingPointError: the VAE produced values that are not finite.
        """
        align_weights(self.vae)
        z = self.vae.denormalize_latents(z).to(get_module_execution_device(self.vae), self.vae.dtype)
        for pixels in self.decode_stream(z):
            chunk = pixels[0].float().cpu().div(2).add_(0.5).clamp_(0, 1)
            if not torch.isfinite(chunk).all():
                raise FloatingPointError(
                    f"the VAE's frames are not finite in {self.vae.dtype}; load it in float32"
                )
            yield chunk

    def frames(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """Decode one video's latents "1 c t h w" to frames "h w 3" in uint8, as they are asked for."""
        frames = 1 + (latents.shape[2] - 1) * self.vae.temporal_stride
        chunks = self.decode_chunks(latents)
        with self.running(), self.progress_bar(total=frames, desc="decoding", unit="frame") as bar:
            while True:
                with torch.no_grad():  # not while the caller has the frame
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                for frame in to_uint8(chunk.permute(1, 2, 3, 0).numpy()):
                    yield frame
                    bar.update()
