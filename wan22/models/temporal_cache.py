"""What causal layers remember of a clip between its chunks.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TemporalCache:
    """The last frames each causal layer saw of one clip, handed from chunk to chunk.

    One cache belongs to one clip, one direction and one tile. The caller makes it, passes it with every chunk
    in order, and drops it; layers hold nothing themselves, so any number of clips can be under way on one
    model. Histories are replaced in place, each when its layer has read it: two generations of them never
    occupy memory at once.
    """

    def __init__(self) -> None:
        """Start a clip: nothing has been seen."""
        self.started = False
        self._history: dict[str, Tensor] = {}

    def exchange(self, layer: str, x: Tensor, frames: int) -> Tensor | None:
        """Return what a layer remembered and remember the end of its new input instead.

        Args:
            layer: the layer's key, see `assign_cache_keys`.
            x: this chunk's input of the layer, "b c t h w", t at least 1.
            frames: how many frames to remember.

        Returns: the last `frames` frames before x, "b c t h w" (zeros before the clip's start); None at the
            first call.
        """
        past = self._history.get(layer)
        t = x.shape[2]
        if t >= frames:
            # A copy, for a view would keep the whole chunk's activation alive.
            self._history[layer] = x[:, :, t - frames :].clone()
        elif past is not None:
            self._history[layer] = torch.cat([past[:, :, t:], x], dim=2)
        else:
            self._history[layer] = F.pad(x, (0, 0, 0, 0, frames - t, 0))
        return past


def assign_cache_keys(model: nn.Module) -> None:
    """Give each layer of a model that has a `cache_key` attribute its own key: its path in the model."""
    for path, layer in model.named_modules():
        if hasattr(layer, "cache_key"):
            layer.cache_key = path


def regroup_frames(chunks: Iterable[Tensor], first: int, size: int) -> Iterator[Tensor]:
    """Cut a stream of frame chunks anew: one group of `first` frames, then groups of `size`.

    Args:
        chunks: tensors "b c t h w" with any numbers of frames.
        first: frames of the first group, at least 1.
        size: frames of each later group, at least 1.

    Yields: groups "b c t h w"; the last one holds what is left.
    """
    pending: list[Tensor] = []
    waiting, wanted = 0, first
    for chunk in chunks:
        pending.append(chunk)
        waiting += chunk.shape[2]
        while waiting >= wanted:
            frames = torch.cat(pending, dim=2) if len(pending) > 1 else pending[0]
            yield frames[:, :, :wanted]
            pending, waiting = [frames[:, :, wanted:]], waiting - wanted
            wanted = size
    if waiting:
        yield torch.cat(pending, dim=2)
