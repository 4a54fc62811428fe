"""The history that causal layers keep of a clip between its chunks.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .strip_rows import Span, StripRows

Unit: TypeAlias = "Callable[[Tensor, TemporalCache | None], Tensor]"


class TemporalCache:
    """The last frames that each causal layer saw of one clip, handed from chunk to chunk.

    One cache belongs to one clip, one direction and one tile. The caller passes it with every chunk in order;
    layers hold no state, so one model can process any number of clips at a time. Each history is replaced
    when its layer has read it, so that two generations of them never occupy memory at once.

    Where frames are computed in strips, each strip has its own histories, and `rows` is what layers keep of
    the strips above; None: frames are computed as a whole.
    """

    def __init__(self) -> None:
        self.started = False
        self.rows: StripRows | None = None
        self._history: dict[Any, Tensor] = {}
        self._watched: bool | None = None  # whether histories came out as they went in; None: nobody asks

    def in_strips(self, spans: Sequence[Span]) -> Iterator[slice]:
        """Go through the strips of a chunk, and yield the rows of each, which layers get meanwhile."""
        self.rows = StripRows(spans)
        try:
            yield from self.rows.strips()
        finally:
            self.rows = None

    def exchange(self, layer: str, x: Tensor, frames: int) -> Tensor | None:
        """Return a layer's last `frames` frames before x "b c t h w", and keep the end of x in their place.

        They are None at the first call, and zeros before the clip's start. `layer` is its `cache_key`.
        """
        key = layer if self.rows is None else (layer, self.rows.strip)
        past = self._take(key)
        t = x.shape[2]
        if t >= frames:
            # A copy, for a view would keep the whole chunk's activation alive.
            now = x[:, :, t - frames :].clone()
        elif past is not None:
            now = torch.cat([past[:, :, t:], x], dim=2)
        else:
            now = F.pad(x, (0, 0, 0, 0, frames - t, 0))
        if self._watched:
            self._watched = same_bits(past, now)
        self._put(key, now)
        return past

    def stands_still(self, unit: Unit, x: Tensor) -> tuple[Tensor, bool]:
        """Run a unit on a chunk; return its result, and whether its histories came out as they went in."""
        self._watched = True
        try:
            return unit(x, self), bool(self._watched)
        finally:
            self._watched = None

    def close(self) -> None:
        """End the clip: forget all histories."""
        self._history = {}

    def _take(self, key: Any) -> Tensor | None:
        """Return a history that `_put` is about to replace."""
        return self._history.get(key)

    def _put(self, key: Any, now: Tensor) -> None:
        self._history[key] = now


class SettledPrefix:
    """Skips the units at the start of a chain whose result would repeat, while a clip stands still.

    A unit whose histories come out as they went in, bit for bit, repeats its result for the same input: it
    has settled. During the zeros after a conditioning image, one unit after the other does.
    """

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._length = 0
        self._output: Tensor | None = None
        # Whether a unit that has settled here has settled everywhere; ranks that share a clip's rows ask.
        self.agree: Callable[[bool], bool] = bool

    def repeats(self, chunk: Tensor) -> bool:
        """Whether a chunk equals the one before; if not, all units have to run."""
        same = same_bits(self._chunk, chunk)
        if not same:
            # A copy, for the caller may fill the same memory anew.
            self._chunk, self._length, self._output = chunk.clone(), 0, None
        return same

    def run(self, units: Sequence[Unit], x: Tensor, cache: TemporalCache) -> Tensor:
        """Run a chain on a chunk "b c t h w" that `repeats`, without the units that have settled."""
        x = x if self._output is None else self._output
        settling = True
        for unit in units[self._length :]:
            if not settling:
                x = unit(x, cache)
                continue
            x, still = cache.stands_still(unit, x)
            # Its next input is this one again, for all units before it have settled.
            settling = self.agree(still)
            if settling:
                self._length, self._output = self._length + 1, x
        return x


def same_bits(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, which 0 and -0 are not."""
    if a is None or a.shape != b.shape or a.dtype != b.dtype or b.is_meta:
        return False  # meta tensors have no bits
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


def assign_cache_keys(model: nn.Module) -> None:
    """Set each layer's `cache_key`, where it has one, to its path in the model."""
    for path, layer in model.named_modules():
        if hasattr(layer, "cache_key"):
            layer.cache_key = path


def regroup_frames(chunks: Iterable[Tensor], first: int, size: int) -> Iterator[Tensor]:
    """Regroup a stream of frames "b c t h w" into `first` of them, then groups of `size`, then the rest."""
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
