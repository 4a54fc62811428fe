"""An autoencoder's rows shared among ranks; the result is that of one rank, up to rounding.

Each rank has a run of the rows, at every resolution. A convolution sees one row more on either side, which
the neighbours send; beyond the picture there are zeros, as ever. Attention in the middle sees whole frames,
which are put together for it, at the lowest resolution.

Shapes: b batch, c channels, t h w frames, rows, columns, of all ranks together or of one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn

from ...models.autoencoder import patchify
from ...models.autoencoder_layers import AttentionBlock, CausalConv3d, Downsample, Upsample
from ...models.temporal_cache import SettledPrefix, TemporalCache
from ..methods import is_own, patch_method
from .mesh import gathered

METHODS = ("encode_chunk", "decode_chunk", "_encode_next")


class RowParallel:
    """Shares an autoencoder's rows among ranks while it encodes and decodes, until detached.

    All ranks are given the same pixels or latents, and get the same result. Clips of fewer latent rows than
    ranks, and those that are decoded in strips, each rank computes by itself.

    Args:
        vae: an AutoencoderKLWan.
        group: the ranks.

    Raises:
        ValueError: a chunk's method is replaced already, by a compilation say.
    """

    def __init__(self, vae: Any, group: Any) -> None:
        if not all(is_own(vae, name) for name in METHODS):
            raise ValueError(
                "the VAE is compiled, or its rows are shared already; pipe.compile(vae=False) leaves it alone"
            )
        self.vae, self.group = vae, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._shares: tuple[int, ...] = ()  # latent rows of each rank, of the clip that is being computed
        self._to_first = False
        self._prefixes: WeakKeyDictionary[SettledPrefix, SettledTogether] = WeakKeyDictionary()
        self._handles: list[Any] = []
        for module in vae.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[1] > 1:
                self._see_beyond(module, crop=1)
            elif isinstance(module, Upsample):  # which doubles what it sees
                self._see_beyond(module, crop=2)
                if module.time_conv is not None:
                    self._handles.append(module.time_conv.register_forward_hook(self._clear_beyond))
            elif isinstance(module, Downsample):
                self._handles.append(module.register_forward_pre_hook(self._see_below))
            elif isinstance(module, AttentionBlock):
                self._handles.append(module.register_forward_pre_hook(self._put_together))
                self._handles.append(module.register_forward_hook(self._take_part))
        patch_method(vae, "encode_chunk", self._encode_chunk)
        patch_method(vae, "decode_chunk", self._decode_chunk)
        patch_method(vae, "_encode_next", self._encode_next)

    def detach(self) -> None:
        """Let each rank compute by itself, as before."""
        for handle in self._handles:
            handle.remove()
        for name in METHODS:
            vars(self.vae).pop(name, None)
        self._handles = []

    @contextmanager
    def to_first(self) -> Iterator[None]:
        """Give what is decoded meanwhile to the first rank alone; each of the others has its own rows."""
        self._to_first = True
        try:
            yield
        finally:
            self._to_first = False

    # ---- chunks ----

    def _encode_chunk(
        self, vae: Any, x: torch.Tensor, cache: TemporalCache | None = None
    ) -> tuple[torch.Tensor, TemporalCache | None]:
        """Encode this rank's rows of "b 3 t h w", and put the moments of all ranks together."""
        with self._sharing(x.shape[3] // vae.spatial_stride) as shared:
            part, cache = type(vae).encode_chunk(vae, self._own(x) if shared else x, cache)
            return self._joined(part) if shared else part, cache

    def _encode_next(
        self, vae: Any, x: torch.Tensor, cache: TemporalCache, settled: SettledPrefix
    ) -> torch.Tensor:
        """Encode the next chunk "b 3 t h w", without what would be computed again on every rank."""
        if torch.is_grad_enabled() or not settled.repeats(x):
            self._prefixes.pop(settled, None)
            return vae.encode_chunk(x, cache)[0]
        with self._sharing(x.shape[3] // vae.spatial_stride) as shared:
            if not shared:
                return vae.encoder(patchify(x, vae.patch_size), cache, settled)
            prefix = self._prefixes.setdefault(settled, SettledTogether(self.group, x.device))
            return self._joined(vae.encoder(patchify(self._own(x), vae.patch_size), cache, prefix))

    def _decode_chunk(
        self, vae: Any, z: torch.Tensor, cache: TemporalCache | None = None
    ) -> tuple[torch.Tensor, TemporalCache | None]:
        """Decode this rank's rows of "b c t h w", and put those of all ranks together."""
        with self._sharing(z.shape[3]) as shared:
            part, cache = type(vae).decode_chunk(vae, self._own(z) if shared else z, cache)
            return self._joined(part, self._to_first) if shared else part, cache

    @contextmanager
    def _sharing(self, rows: int) -> Iterator[bool]:
        """Share so many latent rows out meanwhile; tells whether there are enough."""
        if rows >= self.ranks:
            bounds = [rank * rows // self.ranks for rank in range(self.ranks + 1)]
            self._shares = tuple(stop - start for start, stop in pairwise(bounds))
        try:
            yield bool(self._shares)
        finally:
            self._shares = ()

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of "… h w", at any resolution."""
        scale = x.shape[-2] // sum(self._shares)
        return x.split([rows * scale for rows in self._shares], dim=-2)[self.rank].contiguous()

    def _joined(self, x: torch.Tensor, to_first: bool = False) -> torch.Tensor:
        """Return the rows "… h w" of all ranks; or, on all but the first, this rank's as they are."""
        most, rows = max(self._shares), self._shares[self.rank]
        scale = x.shape[-2] // rows
        filled = F.pad(x, (0, 0, 0, (most - rows) * scale))
        parts = gathered(filled, self.group, to_first)
        if not parts:
            return x
        return torch.cat(
            [part[..., : rows * scale, :] for part, rows in zip(parts, self._shares, strict=True)], dim=-2
        )

    # ---- layers ----

    def _put_together(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give attention whole frames."""
        return (self._joined(arguments[0]), *arguments[1:]) if self._shares else None

    def _take_part(self, module: nn.Module, arguments: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Take this rank's rows of what attention gives."""
        return self._own(x) if self._shares else None

    def _see_beyond(self, module: nn.Module, crop: int) -> None:
        """Give a layer a row more on either side, and leave out what it makes of them: so many rows."""

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x, *rest = arguments
            return (self._with_neighbours(x), *rest) if self._shares else None

        def after(module: nn.Module, arguments: Any, x: torch.Tensor) -> torch.Tensor | None:
            return x[..., crop:-crop, :] if self._shares else None

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _see_below(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give a layer that halves the rows the next one below; under the picture's last it puts zeros."""
        if not self._shares:
            return None
        x, *rest = arguments
        _, below = self._neighbours(x, from_above=False)
        return (x if below is None else torch.cat([x, below], dim=-2), *rest)

    def _clear_beyond(self, module: nn.Module, arguments: Any, x: torch.Tensor) -> None:
        """Make the rows beyond the picture zeros again, to which a bias was added."""
        if self._shares and self.rank == 0:
            x[..., :1, :] = 0
        if self._shares and self.rank + 1 == self.ranks:
            x[..., -1:, :] = 0

    def _with_neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """Return "… h w" with the neighbours' nearest rows around it, zeros where there is none."""
        zeros = x.new_zeros(x[..., :1, :].shape)
        above, below = self._neighbours(x)
        return torch.cat([zeros if above is None else above, x, zeros if below is None else below], dim=-2)

    def _neighbours(
        self, x: torch.Tensor, from_above: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the nearest rows "… 1 w" of the ranks above (if they are asked for) and below."""
        above, below = self.rank > 0, self.rank + 1 < self.ranks
        top, bottom = x[..., :1, :], x[..., -1:, :]
        row = top.numel()
        # What goes up comes from below.
        sent, received = [0] * self.ranks, [0] * self.ranks
        edges = []
        if above:
            edges.append(top)
            sent[self.rank - 1] = row
            received[self.rank - 1] = row if from_above else 0
        if below:
            edges += [bottom] if from_above else []
            sent[self.rank + 1] = row if from_above else 0
            received[self.rank + 1] = row
        parts = torch.cat([edge.flatten() for edge in edges]) if edges else x.new_empty(0)
        got = collectives.wait_tensor(collectives.all_to_all_single(parts, received, sent, self.group))
        rows = [part.view(top.shape) for part in got.split(row)] if got.numel() else []
        return (rows.pop(0) if above and from_above else None), (rows.pop(0) if below else None)


class SettledTogether(SettledPrefix):
    """The units that have settled on every rank: rows of one are seen by others.

    Args:
        group: the ranks.
        device: where they agree.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__()
        self._group, self._device = group, device

    def has_settled(self, histories: Sequence[tuple[torch.Tensor | None, torch.Tensor]]) -> bool:
        """Whether a unit's histories came out as they went in, on every rank."""
        mine = torch.tensor(int(super().has_settled(histories)), device=self._device)
        return bool(collectives.all_reduce(mine, "min", self._group).item())
