"""From latents to frames, chunk by chunk.

Shapes: b videos, c channels, t h w frames, rows, columns, of latents or pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import autoencoders

Bar = Callable[..., Any]


def decode(vae: Any, latents: torch.Tensor, output_type: str, bar: Bar, retry: bool) -> Any:
    """Decode normalised latents "b c t h w" into frames of an output type of `WanVideo.frames`.

    `bar` makes a progress bar; `retry` goes on in strips where memory runs out.
    """
    if output_type == "latent":
        return latents
    as_uint8, colours_last = output_type == "pil", output_type != "pt"
    frames = 1 + (latents.shape[2] - 1) * autoencoders.temporal_stride(vae)
    rows, columns = (length * autoencoders.spatial_stride(vae) for length in latents.shape[3:])
    size = (frames, rows, columns, 3) if colours_last else (3, frames, rows, columns)
    videos = torch.empty(len(latents), *size, dtype=torch.uint8 if as_uint8 else torch.float32)
    with bar(total=len(videos) * frames, desc="decoding", unit="frame") as progress:
        for z, video in zip(latents.split(1), videos, strict=True):
            time, done = 0 if colours_last else 1, 0
            for chunk in autoencoders.decode(vae, z, retry, as_uint8, colours_last):
                count = chunk.shape[time]
                video.narrow(time, done, count).copy_(chunk)
                done += count
                progress.update(count)
    if as_uint8:
        return [[Image.fromarray(frame) for frame in video] for video in videos.numpy()]
    return videos.numpy() if colours_last else videos.transpose(1, 2)  # b c t h w -> b t c h w


def stream_frames(
    vae: Any, latents: torch.Tensor, bar: Bar, retry: bool, using: Callable[[], AbstractContextManager[None]]
) -> Iterator[np.ndarray]:
    """Decode one video's latents "1 c t h w" to frames "h w 3" in uint8, as they are asked for.

    Within `using()` the VAE computes; the caller has the frames outside of it.
    """
    chunks = autoencoders.decode(vae, latents, retry, as_uint8=True, colours_last=True)
    frames = 1 + (latents.shape[2] - 1) * autoencoders.temporal_stride(vae)
    with bar(total=frames, desc="decoding", unit="frame") as progress:
        while True:
            with using(), torch.no_grad():
                chunk = next(chunks, None)
            if chunk is None:
                return
            # Not the memory that copies from a GPU arrive in, which whoever keeps a frame would take away.
            for frame in chunk.numpy() if latents.is_cpu else chunk.numpy().copy():
                yield frame
                progress.update()
