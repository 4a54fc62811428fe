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
    videos, as_uint8 = [], output_type == "pil"
    frames = 1 + (latents.shape[2] - 1) * autoencoders.temporal_stride(vae)
    rows, columns = (length * autoencoders.spatial_stride(vae) for length in latents.shape[3:])
    shape = (frames, rows, columns, 3) if as_uint8 else (3, frames, rows, columns)
    with bar(total=len(latents) * frames, desc="decoding", unit="frame") as progress:
        for z in latents.split(1):
            video = torch.empty(shape, dtype=torch.uint8 if as_uint8 else torch.float32)
            in_time, done = video if as_uint8 else video.transpose(0, 1), 0  # t first
            for chunk in autoencoders.decode(vae, z, retry, as_uint8):
                chunk = chunk if as_uint8 else chunk.transpose(0, 1)
                in_time[done : done + len(chunk)] = chunk
                done += len(chunk)
                progress.update(len(chunk))
            videos.append(video)
    if output_type == "pt":
        return torch.stack(videos).transpose(1, 2)  # b c t h w -> b t c h w
    if as_uint8:
        return [[Image.fromarray(frame) for frame in video.numpy()] for video in videos]
    return np.stack([video.permute(1, 2, 3, 0).numpy() for video in videos])


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
