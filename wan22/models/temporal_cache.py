"""What causal layers remember of a clip between its chunks.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Unit: TypeAlias = "Callable[[Tensor, TemporalCache | None], Tensor]"


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

    def snapshot(self) -> dict[str, Tensor]:
        """Return what every layer remembers now; `exchange` leaves these tensors as they are."""
        return dict(self._history)

    def exchanged_since(self, snapshot: dict[str, Tensor]) -> list[tuple[Tensor | None, Tensor]]:
        """Return, for each layer that called `exchange` since, what it remembered before and what now."""
        return [
            (snapshot.get(layer), now)
            for layer, now in self._history.items()
            if now is not snapshot.get(layer)
        ]


class SettledPrefix:
    """The units at the start of a chain that would only repeat themselves, and what the last of them gave.

    A unit whose histories come out as they went in, bit for bit, gives the same result if it gets the same
    input again: it has settled. While a clip stands still, as the zeros after a conditioning image do, one
    unit after the other settles and need not run any more. Of a clip that moves, only the last chunk is kept.
    """

    def __init__(self) -> None:
        """Start a clip: nothing has settled."""
        self._chunk: Tensor | None = None
        self._length = 0
        self._output: Tensor | None = None
        # Whether a unit that has settled here has settled everywhere; ranks that share a clip's rows ask.
        self.agree: Callable[[bool], bool] = bool

    def repeats(self, chunk: Tensor) -> bool:
        """Whether a chunk is the one before again; if not, all units have to run."""
        same = same_bits(self._chunk, chunk)
        if not same:
            # A copy, for the caller may fill the same memory anew.
            self._chunk, self._length, self._output = chunk.clone(), 0, None
        return same

    def run(self, units: Sequence[Unit], x: Tensor, cache: TemporalCache) -> Tensor:
        """Run a chain on a chunk that `repeats`, without the units that have settled.

        Args:
            units: the layers, each called with its input and the cache.
            x: the first unit's input, "b c t h w".
            cache: the clip's cache.
        Returns: the last unit's output.
        """
        x = x if self._output is None else self._output
        settling = True
        for unit in units[self._length :]:
            before = cache.snapshot()
            x = unit(x, cache)
            # Its next input is this one again, for all units before it have settled.
            settling = settling and self.agree(_has_settled(cache.exchanged_since(before)))
            if settling:
                self._length, self._output = self._length + 1, x
        return x


def _has_settled(histories: Iterable[tuple[Tensor | None, Tensor]]) -> bool:
    """Whether a unit's histories came out as they went in, given each before and after."""
    return all(same_bits(*pair) for pair in histories)


def same_bits(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, which 0 and -0 are not."""
    if a is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


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
            waiting -= wanted
            pending = [frames[:, :, wanted:]] if waiting else []
            wanted = size
    if waiting:
        yield torch.cat(pending, dim=2)
