"""What a pipeline asks of an autoencoder: wan22's, in chunks, or diffusers' own, clip by clip.

Shapes: b videos, c channels, t h w frames, rows, columns, of latents or pixels.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device

from ...accel.offload.devices import CudaDevice
from ...accel.offload.histories import HostHistories
from ...checkpoints.loading.alignment import align_weights
from ...checkpoints.loading.models import is_ours
from ...devices import HostCopies, has_own_memory
from ...models.autoencoder import Caches, denormalized, normalized, strides_of
from ...models.autoencoder_memory import STRIPS
from ...models.temporal_cache import TemporalCache
from ...private_apis import accelerate_hook

logger = logging.getLogger(__name__)


def temporal_stride(vae: Any) -> int:
    """Return the frames per latent frame."""
    return strides_of(vae.config)[0]


def spatial_stride(vae: Any) -> int:
    """Return the pixels per latent row and column."""
    return strides_of(vae.config)[1]


@cache
def warn_of_slow_convolutions(device: str, dtype: torch.dtype) -> None:
    """Say, once, where PyTorch convolves videos in half precision without cuDNN, at many times the memory.

    Source: pytorch/pytorch issues 166643 and 166122: 2.9.0, and 2.9.1 with a cuDNN before 9.15.
    """
    if device != "cuda" or torch.version.hip or dtype not in (torch.bfloat16, torch.float16):
        return
    version, cudnn = torch.__version__.partition("+")[0], torch.backends.cudnn.version() or 0
    if version == "2.9.0" or (version.startswith("2.9.") and cudnn < 91500):
        logger.warning(
            "PyTorch %s convolves videos in %s without cuDNN, which takes many times the memory and time: "
            "install PyTorch 2.10 or newer, or keep the VAE in float32",
            *(torch.__version__, str(dtype).removeprefix("torch.")),
        )


@torch.no_grad()
def encode(vae: Any, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """Encode a clip given in pieces "1 3 t h w" in [-1, 1] into normalised latents "1 c t h w", float32.

    A FloatingPointError says if they are not finite.
    """
    align_weights(vae)
    device = get_module_execution_device(vae)
    moved = (piece.to(device, vae.dtype) for piece in pieces)
    if is_ours(vae):
        posteriors = vae.encode_stream(moved, caches=_caches(vae, device))
        latents = torch.cat([posterior.mode() for posterior in posteriors], dim=2)
    else:
        latents = vae.encode(torch.cat(list(moved), dim=2)).latent_dist.mode()
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            f"the image's latents are not finite in {vae.dtype}; load the VAE in float32"
        )
    return normalized(latents, vae.config.latents_mean, vae.config.latents_std)


def decode(
    vae: Any, z: torch.Tensor, retry: bool, as_uint8: bool = False, colours_last: bool = False
) -> Iterator[torch.Tensor]:
    """Decode one video's normalised latents "1 c t h w" chunk by chunk: "c t h w" in [0, 1], on the CPU.

    With `as_uint8` they are 0 to 255, truncated as in the official code, with `colours_last` "t h w c". A GPU
    decodes the next chunk while one is used. wan22's VAE goes on in strips where memory runs out, if `retry`.
    Between two chunks other calls may use the VAE, and hooks may have moved it away.

    Raises:
        FloatingPointError: frames are not finite.
        RuntimeError: between two chunks the VAE was moved, or cast to another dtype.
    """
    align_weights(vae)
    z = denormalized(z, vae.config.latents_mean, vae.config.latents_std)
    z = z.to(get_module_execution_device(vae), vae.dtype)
    warn_of_slow_convolutions(z.device.type, z.dtype)
    if is_ours(vae):
        chunks = _in_more_strips(vae, z) if retry else vae.decode_stream(z, caches=_caches(vae, z.device))
    else:
        chunks = iter(vae.decode(z, return_dict=False)[0].split(temporal_stride(vae), dim=2))
    left = 1 + (z.shape[2] - 1) * temporal_stride(vae)
    copies: HostCopies[None] = HostCopies(z.device)
    finished = partial(_frames_of, as_uint8=as_uint8, colours_last=colours_last)
    for frames, finite in map(finished, chunks):
        copies.put(None, frames, finite)
        left -= frames.shape[0 if colours_last else 1]
        del frames, finite  # or they would be on the device while the next chunk is decoded
        for chunk in _checked(copies.arrived(), vae.dtype):
            yield chunk
            if left and is_ours(vae):  # diffusers' has decoded all
                _bring_back(vae, z)
        if not left:
            break
    yield from _checked(copies.rest(), vae.dtype)


def _frames_of(pixels: torch.Tensor, as_uint8: bool, colours_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a chunk's frames of pixels "1 c t h w" in [-1, 1], see `decode`, and whether they are finite."""
    frames = pixels[0].float().div(2).add_(0.5).clamp_(0, 1)
    finite = torch.isfinite(frames.sum())  # NaN, if any of them is; one number in place of a mask
    frames = frames.mul_(255).to(torch.uint8) if as_uint8 else frames
    return frames.permute(1, 2, 3, 0).contiguous() if colours_last else frames, finite


def _checked(
    arrived: Iterable[tuple[None, tuple[torch.Tensor, ...]]], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yield chunks of frames that have arrived, and refuse those that are not finite."""
    for _, (chunk, finite) in arrived:
        if not finite:
            raise FloatingPointError(f"the VAE's frames are not finite in {dtype}; load it in float32")
        yield chunk


def _bring_back(vae: Any, z: torch.Tensor) -> None:
    """Bring the VAE to where a clip's latents are, if hooks move it."""
    hook = accelerate_hook(vae)
    if hook is not None:
        hook.pre_forward(vae)
    device, dtype = z.new_empty(0, device=get_module_execution_device(vae)).device, vae.dtype
    if (device, dtype) != (z.device, z.dtype):
        raise RuntimeError(
            f"the rest of the video cannot be decoded: the VAE is on {device} in {dtype} now, and was on "
            f"{z.device} in {z.dtype} for the first frames; make the video again"
        )


def _in_more_strips(vae: Any, z: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode raw latents "1 c t h w" to "1 3 t h w" in [-1, 1], in more strips once memory runs out."""
    done, before = 0, vae.num_strips if vae.use_strips else None
    while True:
        try:
            for chunk in islice(vae.decode_stream(z, caches=_caches(vae, z.device)), done, None):
                yield chunk
                done += 1
            return
        except torch.OutOfMemoryError:
            strips = 2 * (vae.num_strips if vae.use_strips else 1)
            if vae.use_tiling:
                raise
            if strips > STRIPS[-1]:  # which do not help either
                vae.disable_strips() if before is None else vae.enable_strips(before)
                raise
        # Outside of the handler, which keeps what ran out alive.
        logger.warning("memory ran out while decoding; from now on it is done in %d strips", strips)
        vae.enable_strips(strips)


def _caches(vae: Any, device: torch.device) -> Caches:
    """Return what makes a clip's cache: in strips, histories of earlier frames lie in the host's memory."""
    return (
        partial(HostHistories, CudaDevice(device))
        if vae.use_strips and has_own_memory(device)
        else TemporalCache
    )
