"""From latents to frames, chunk by chunk.

Shapes: b videos, c channels, t h w frames, rows, columns, of latents or pixels.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image

from ...checkpoints.loading.alignment import align_weights
from ...checkpoints.loading.models import AutoencoderKLWan
from ...video.result import to_uint8

logger = logging.getLogger(__name__)

# More save no memory: what the layers remember of earlier frames is then the larger part.
MOST_STRIPS = 4
Bar = Callable[..., Any]


def decode(vae: AutoencoderKLWan, latents: torch.Tensor, output_type: str, bar: Bar, retry: bool) -> Any:
    """Decode normalised latents "b c t h w" into frames of an output type of `WanVideo.frames`.

    `bar` makes a progress bar; `retry` goes on in strips where memory runs out.
    """
    if output_type == "latent":
        return latents
    videos = []
    frames = 1 + (latents.shape[2] - 1) * vae.temporal_stride
    rows, columns = (length * vae.spatial_stride for length in latents.shape[3:])
    with bar(total=len(latents) * frames, desc="decoding", unit="frame") as progress:
        for z in latents.split(1):
            video = torch.empty(3, frames, rows, columns)  # c t h w
            done = 0
            for chunk in decode_chunks(vae, z, retry):
                video[:, done : done + chunk.shape[1]] = chunk
                done += chunk.shape[1]
                progress.update(chunk.shape[1])
            videos.append(video)
    if output_type == "pt":
        return torch.stack(videos).transpose(1, 2)  # b c t h w -> b t c h w
    arrays = np.stack([video.permute(1, 2, 3, 0).numpy() for video in videos])
    return arrays if output_type == "np" else [[Image.fromarray(f) for f in v] for v in to_uint8(arrays)]


def stream_frames(
    vae: AutoencoderKLWan, latents: torch.Tensor, bar: Bar, retry: bool
) -> Iterator[np.ndarray]:
    """Decode one video's latents "1 c t h w" to frames "h w 3" in uint8, as they are asked for."""
    chunks = decode_chunks(vae, latents, retry)
    frames = 1 + (latents.shape[2] - 1) * vae.temporal_stride
    with bar(total=frames, desc="decoding", unit="frame") as progress:
        while True:
            with torch.no_grad():  # not while the caller has the frame
                chunk = next(chunks, None)
            if chunk is None:
                return
            for frame in to_uint8(chunk.permute(1, 2, 3, 0).numpy()):
                yield frame
                progress.update()


def decode_chunks(vae: AutoencoderKLWan, z: torch.Tensor, retry: bool) -> Iterator[torch.Tensor]:
    """Decode one video's normalised latents "1 c t h w" chunk by chunk: "c t h w" in [0, 1], on the CPU."""
    align_weights(vae)
    z = vae.denormalize_latents(z).to(get_module_execution_device(vae), vae.dtype)
    for pixels in in_more_strips(vae, z) if retry else vae.decode_stream(z):
        chunk = pixels[0].float().cpu().div(2).add_(0.5).clamp_(0, 1)
        if not torch.isfinite(chunk).all():
            raise FloatingPointError(f"the VAE's frames are not finite in {vae.dtype}; load it in float32")
        yield chunk


def in_more_strips(vae: AutoencoderKLWan, z: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode raw latents "1 c t h w" to "1 3 t h w" in [-1, 1], in more strips once memory runs out."""
    done = 0
    while True:
        try:
            for chunk in islice(vae.decode_stream(z), done, None):
                yield chunk
                done += 1
            return
        except torch.OutOfMemoryError:
            strips = 2 * (vae.num_strips if vae.use_strips else 1)
            if vae.use_tiling or strips > MOST_STRIPS:
                raise
        # Outside of the handler, which keeps what ran out alive.
        logger.warning("memory ran out while decoding; from now on it is done in %d strips", strips)
        vae.enable_strips(strips)
