"""Histories of an autoencoder's layers on the host, from where they come back as they are needed.

Between a clip's chunks the histories take more memory than a strip that is computed. Here each of them is
copied to the host as soon as it is made, and back while the layer before the one that needs it computes.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.temporal_cache import TemporalCache
from .devices import Device, Mark


@dataclass
class _Stored:
    """A history on the host, and how its bytes are laid out."""

    host: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def history_in(self, buffer: Tensor) -> Tensor:
        return buffer.view(self.dtype).as_strided(self.shape, self.stride)


class HostHistories(TemporalCache):
    """A cache whose histories lie in the host's memory, pinned if the system pins that much.

    A chunk's layers ask for their histories in the order of the chunk before, so the next one is known. The
    device holds what a layer has just got, what comes next, and what is on its way to the host.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self._stored: dict[Any, _Stored] = {}
        self._next: dict[Any, Any] = {}  # which history was asked for after each one
        self._latest: Any = None
        self._coming: tuple[Any, Tensor, Mark] | None = None
        self._leaving: deque[tuple[Tensor, Mark]] = (
            deque()
        )  # the memory must not be used before the copy ends

    def close(self) -> None:
        """See TemporalCache; waits for copies on their way."""
        marks = [mark for _, mark in self._leaving]
        marks += [self._coming[2]] if self._coming else []
        for mark in marks:
            self._device.finish(mark)
        self._leaving.clear()
        self._stored, self._next, self._latest, self._coming = {}, {}, None, None
        super().close()

    def _take(self, key: Any) -> Tensor | None:
        self._next[self._latest], self._latest = key, key
        if self._coming is None or self._coming[0] != key:
            self._drop_coming()
            self._fetch(key)
        past, self._coming = self._coming, None
        if past is not None:
            self._device.wait(past[2])
        # All copies but the one that was queued last came before that of `past`.
        while len(self._leaving) > 1:
            self._device.wait(self._leaving[0][1])
            self._leaving.popleft()
        following = self._next.get(key)
        if following != key:  # whose history is about to be replaced
            self._fetch(following)
        return None if past is None else self._stored[key].history_in(past[1])

    def _put(self, key: Any, now: Tensor) -> None:
        data = now.as_strided((now.numel(),), (1,)).view(torch.uint8)
        stored = self._stored.get(key)
        host = self._allocate_host(data.nbytes) if stored is None else stored.host
        self._stored[key] = _Stored(host, now.shape, now.stride(), now.dtype)
        self._leaving.append((now, self._device.copy(host, data, self._device.release(host))))

    def _fetch(self, key: Any) -> None:
        if key in self._stored:
            host = self._stored[key].host
            buffer = self._device.allocate(host.nbytes)
            self._coming = key, buffer, self._device.copy(buffer, host, self._device.release(buffer))

    def _drop_coming(self) -> None:
        """Let go of a history that was fetched for nothing, once nothing is copied to its memory."""
        if self._coming is not None:
            self._device.wait(self._coming[2])
            self._coming = None

    def _allocate_host(self, nbytes: int) -> Tensor:
        try:
            return self._device.allocate_host(nbytes)
        except MemoryError:
            # Copies from and to memory that is not pinned are as right, but make the host wait.
            return torch.empty(nbytes, dtype=torch.uint8)
