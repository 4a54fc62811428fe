"""From cached clips to batches: what is random about a sample depends on the seed and its number.

Shapes: b samples, c channels, t h w latent frames, rows, columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..pipelines.call.text import pad_tokens
from .data.batches import batches_of_epoch
from .data.cached import CachedClips
from .draws import noise_like, uniform
from .objective import Batch


@dataclass(frozen=True)
class Drawing:
    """What is drawn for each sample.

    Args:
        seed: of all draws.
        caption_dropout: share of samples without their caption.
        first_frame: share of samples whose first frame is given; 0 where the checkpoint has no such mode.
    """

    seed: int
    caption_dropout: float = 0.0
    first_frame: float = 0.0

    def draw(
        self, clips: CachedClips, indices: Sequence[int], numbers: Sequence[int], dtype: torch.dtype
    ) -> tuple[Batch, torch.Tensor]:
        """Return clips of one size as a batch, and their noise "b c t h w", on the CPU.

        Args:
            clips: the data.
            indices: which of them.
            numbers: the samples' numbers in the run.
            dtype: of the text, which the large linear layers run in.
        """
        samples = [clips.read(i) for i in indices]
        texts = [
            clips.empty_text if uniform(self.seed, "caption", n) < self.caption_dropout else sample.text
            for sample, n in zip(samples, numbers, strict=True)
        ]
        latents = torch.stack([sample.latents.float() for sample in samples])
        noise = [noise_like(x, self.seed, "noise", n) for x, n in zip(latents, numbers, strict=True)]
        batch = Batch(
            latents,
            torch.cat([pad_tokens(text[None]) for text in texts]).to(dtype),
            _stacked([sample.condition for sample in samples]),
            _stacked([sample.image_embeds for sample in samples]),
            self._first_given(numbers, latents.shape[2]),
        )
        return batch, torch.stack(noise)

    def _first_given(self, numbers: Sequence[int], frames: int) -> torch.Tensor | None:
        if not self.first_frame or frames == 1:
            return None
        return torch.tensor([uniform(self.seed, "first frame", n) < self.first_frame for n in numbers])


def _stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [tensor.float() for tensor in tensors if tensor is not None]
    return torch.stack(given) if given else None


def moved(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Return a batch on a device; CLIP tokens in a dtype, as for inference."""
    condition, images, first = batch.condition, batch.image_embeds, batch.first_given
    return Batch(
        batch.latents.to(device),
        batch.text.to(device),
        None if condition is None else condition.to(device),
        None if images is None else images.to(device, dtype),
        None if first is None else first.to(device),
    )


class Order:
    """Which clips each of a run's batches has: batches of an epoch, epoch after epoch.

    Args:
        clips: the data.
        batch_size: clips of a batch.
        seed: of the order.
    """

    def __init__(self, clips: CachedClips, batch_size: int, seed: int) -> None:
        def of_epoch(epoch: int) -> list[list[int]]:
            return batches_of_epoch(clips, batch_size, seed, epoch)

        self._of_epoch = lru_cache(maxsize=2)(of_epoch)
        self.batches = len(self._of_epoch(0))  # of each epoch

    def batch(self, number: int) -> list[int]:
        """Return the clips of a batch, by its number in the run."""
        epoch, place = divmod(number, self.batches)
        return self._of_epoch(epoch)[place]
