"""The history that causal layers keep of a clip between its chunks.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..private_apis import version
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
        # How many chunks in a row each layer's input was that of the chunk before.
        self._repeats: dict[Any, int] = {}
        self._watch: _Watch | None = None

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
        self._put(key, now)
        self._count_repeats(key, -(-frames // t))
        return past

    def run(self, unit: Unit, x: Tensor, repeats: bool) -> tuple[Tensor, bool, bool]:
        """Run a unit on a chunk, of which it is known whether it repeats the chunk before.

        Returns: its result; whether its histories came out as they went in; whether its result repeats.
        """
        self._watch = watch = _Watch(repeats)
        try:
            return unit(x, self), watch.settled, repeats and all(watch.repeat.values())
        finally:
            self._watch = None

    def _count_repeats(self, key: Any, chunks: int) -> None:
        """Note that a layer, whose history spans so many chunks, has got its input."""
        if self._watch is None:
            self._repeats.pop(key, None)
            return
        watch, strip = self._watch, 0 if self.rows is None else self.rows.strip
        count = self._repeats.get(key, 0) + 1 if watch.repeat.setdefault(strip, watch.given) else 0
        self._repeats[key] = count
        watch.settled &= count >= chunks
        # Its result is that of the chunk before if it had the same history as well.
        watch.repeat[strip] = count > chunks

    def close(self) -> None:
        """End the clip: forget all histories."""
        self._history = {}

    def _take(self, key: Any) -> Tensor | None:
        """Return a history that `_put` is about to replace."""
        return self._history.get(key)

    def _put(self, key: Any, now: Tensor) -> None:
        self._history[key] = now


@dataclass
class _Watch:
    """What is known of a unit's chunk.

    Args:
        given: whether the unit's input repeats.
        settled: whether the histories of its layers came out as they went in, so far.
        repeat: by strip, whether the input of the next layer repeats.
    """

    given: bool
    settled: bool = True
    repeat: dict[int, bool] = field(default_factory=dict)


class SettledPrefix:
    """Skips the units at the start of a chain whose result would repeat, while a clip stands still.

    A unit whose histories come out as they went in repeats its result for the same input: it has settled.
    During the zeros after a conditioning image, one unit after the other does. When is known from how many
    chunks each layer looks back to, so no device is asked for the values.
    """

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._version: int | None = None
        self._length = 0
        self._output: Tensor | None = None

    def repeats(self, chunk: Tensor) -> bool:
        """Whether a chunk equals the one before; if not, all units have to run."""
        same = self._is_last(chunk)
        if not same:
            self._length, self._output = 0, None
            # The caller may fill the same memory anew. On a device that counts as a write; memory of the host
            # may be shared with others, whose writes do not.
            counted = chunk.device.type not in ("cpu", "meta") and not chunk.is_inference()
            self._chunk = chunk if counted else chunk.clone()
            self._version = version(chunk) if counted else None
        return same

    def run(self, units: Sequence[Unit], x: Tensor, cache: TemporalCache) -> Tensor:
        """Run a chain on a chunk "b c t h w" that `repeats`, without the units that have settled."""
        x = x if self._output is None else self._output
        settling = repeats = True
        for unit in units[self._length :]:
            if not settling:
                x = unit(x, cache)
                continue
            # Its next input is this one again, for all units before it have settled.
            x, settling, repeats = cache.run(unit, x, repeats)
            if settling:
                self._length, self._output = self._length + 1, x
        return x

    def _is_last(self, chunk: Tensor) -> bool:
        last = self._chunk
        if last is None or (self._version is not None and version(last) != self._version):
            return False
        # The device, which would be waited for, need not compare memory with itself.
        return (self._version is not None and _same_memory(last, chunk)) or same_bits(last, chunk)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


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
