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
    as_uint8 = output_type == "pil"
    frames = 1 + (latents.shape[2] - 1) * autoencoders.temporal_stride(vae)
    rows, columns = (length * autoencoders.spatial_stride(vae) for length in latents.shape[3:])
    count = len(latents)
    if output_type == "pt":  # colours outermost
        videos = torch.empty(count, 3, frames, rows, columns).permute(0, 2, 3, 4, 1)
    else:
        dtype = torch.uint8 if as_uint8 else torch.float32
        videos = torch.empty(count, frames, rows, columns, 3, dtype=dtype)  # b t h w c
    with bar(total=count * frames, desc="decoding", unit="frame") as progress:
        for z, video in zip(latents.split(1), videos, strict=True):
            done = 0
            for chunk in autoencoders.decode(vae, z, retry, as_uint8):
                chunk = chunk if as_uint8 else chunk.permute(1, 2, 3, 0)
                video[done : done + len(chunk)] = chunk
                done += len(chunk)
                progress.update(len(chunk))
    if as_uint8:
        return [[Image.fromarray(frame) for frame in video] for video in videos.numpy()]
    return videos.permute(0, 1, 4, 2, 3) if output_type == "pt" else videos.numpy()


def stream_frames(
    vae: Any, latents: torch.Tensor, bar: Bar, retry: bool, using: Callable[[], AbstractContextManager[None]]
) -> Iterator[np.ndarray]:
    """Decode one video's latents "1 c t h w" to frames "h w 3" in uint8, as they are asked for.

    Within `using()` the VAE computes; the caller has the frames outside of it.
    """
    chunks = autoencoders.decode(vae, latents, retry, as_uint8=True)
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
