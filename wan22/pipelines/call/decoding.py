"""From latents to frames, chunk by chunk.

Shapes: b videos, c channels, t h w frames, rows, columns, of latents or pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...video.result import to_uint8
from . import autoencoders

Bar = Callable[..., Any]


def decode(vae: Any, latents: torch.Tensor, output_type: str, bar: Bar, retry: bool) -> Any:
    """Decode normalised latents "b c t h w" into frames of an output type of `WanVideo.frames`.

    `bar` makes a progress bar; `retry` goes on in strips where memory runs out.
    """
    if output_type == "latent":
        return latents
    videos = []
    frames = 1 + (latents.shape[2] - 1) * autoencoders.temporal_stride(vae)
    rows, columns = (length * autoencoders.spatial_stride(vae) for length in latents.shape[3:])
    with bar(total=len(latents) * frames, desc="decoding", unit="frame") as progress:
        for z in latents.split(1):
            video = torch.empty(3, frames, rows, columns)  # c t h w
            done = 0
            for chunk in autoencoders.decode(vae, z, retry):
                video[:, done : done + chunk.shape[1]] = chunk
                done += chunk.shape[1]
                progress.update(chunk.shape[1])
            videos.append(video)
    if output_type == "pt":
        return torch.stack(videos).transpose(1, 2)  # b c t h w -> b t c h w
    arrays = np.stack([video.permute(1, 2, 3, 0).numpy() for video in videos])
    return arrays if output_type == "np" else [[Image.fromarray(f) for f in v] for v in to_uint8(arrays)]


def stream_frames(
    vae: Any, latents: torch.Tensor, bar: Bar, retry: bool, using: Callable[[], AbstractContextManager[None]]
) -> Iterator[np.ndarray]:
    """Decode one video's latents "1 c t h w" to frames "h w 3" in uint8, as they are asked for.

    Within `using()` the VAE computes; the caller has the frames outside of it.
    """
    chunks = autoencoders.decode(vae, latents, retry)
    frames = 1 + (latents.shape[2] - 1) * autoencoders.temporal_stride(vae)
    with bar(total=frames, desc="decoding", unit="frame") as progress:
        while True:
            with using(), torch.no_grad():
                chunk = next(chunks, None)
            if chunk is None:
                return
            for frame in to_uint8(chunk.permute(1, 2, 3, 0).numpy()):
                yield frame
                progress.update()
