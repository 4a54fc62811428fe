"""An autoencoder's rows shared among ranks; the result is that of one rank, up to rounding.

Each rank has consecutive rows, at every resolution. Convolutions get one more row on either side, which the
neighbours send; beyond the picture it is zero, as padding is. Attention in the middle gets whole frames,
gathered at the lowest resolution.

Shapes: b batch, c channels, t h w frames, rows, columns, of all ranks together or of one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.loading.models import is_ours
from ...models.autoencoder import AutoencoderKLWan
from ...models.autoencoder_layers import AttentionBlock, CausalConv3d, Downsample, Upsample
from ..methods import is_own
from .mesh import gathered

_shared: WeakSet[nn.Module] = WeakSet()


class RowParallel:
    """Shares an autoencoder's rows among ranks while it encodes and decodes, until detached.

    All ranks are given the same pixels or latents, and get the same result. Each rank computes by itself what
    is encoded or decoded in strips, and clips of fewer latent rows than ranks.
    """

    def __init__(self, vae: AutoencoderKLWan, group: dist.ProcessGroup) -> None:
        if not is_ours(vae):
            raise ValueError(
                f"the rows of a {type(vae).__name__} that is not wan22's cannot be shared; load it with "
                "wan22.AutoencoderKLWan, or leave it alone: vae=False"
            )
        if vae in _shared or not all(is_own(part, "forward") for part in (vae.encoder, vae.decoder)):
            raise ValueError(
                "the VAE is compiled, or its rows are shared already; pipe.compile() leaves it alone"
            )
        _shared.add(vae)
        self.vae, self.group = vae, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._shares: tuple[int, ...] = ()  # latent rows of each rank, of the chunk that is being computed
        self._to_first = False
        self._handles: list[Any] = []
        self._around(vae.encoder, self._share_pixels, self._join_moments)
        self._around(vae.decoder, self._share_latents, self._join_pixels)
        for module in vae.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[1] > 1:
                self._with_halo(module, crop=1)
            elif isinstance(module, Upsample):  # one row in, two rows out
                self._with_halo(module, crop=2)
                if module.time_conv is not None:
                    self._handles.append(module.time_conv.register_forward_hook(self._clear_beyond))
            elif isinstance(module, Downsample):
                self._handles.append(module.register_forward_pre_hook(self._with_row_below))
            elif isinstance(module, AttentionBlock):
                self._around(module, self._gather_frames, self._take_own)

    def detach(self) -> None:
        """Let each rank compute all rows, as before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _shared.discard(self.vae)

    @contextmanager
    def to_first(self) -> Iterator[None]:
        """Gather what is decoded meanwhile on the first rank alone; the others get their own rows."""
        self._to_first = True
        try:
            yield
        finally:
            self._to_first = False

    def _around(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    # ---- chunks ----

    def _share_pixels(self, encoder: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give the encoder this rank's rows, unless it encodes in strips."""
        x, *rest = arguments
        rows = x.shape[3] * self.vae.patch_size // self.vae.spatial_stride
        if not self._share(0 if self.vae.use_strips else rows):
            return None
        return (self._own(x), *rest)

    def _share_latents(self, decoder: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give the decoder this rank's rows, unless it decodes in strips."""
        z, *rest = arguments
        return (self._own(z), *rest) if self._share(0 if self.vae.use_strips else z.shape[3]) else None

    def _share(self, rows: int) -> bool:
        """Divide latent rows among the ranks, and return whether there are enough."""
        bounds = [rank * rows // self.ranks for rank in range(self.ranks + 1)]
        self._shares = tuple(stop - start for start, stop in pairwise(bounds)) if rows >= self.ranks else ()
        return bool(self._shares)

    def _join_moments(self, encoder: nn.Module, arguments: Any, x: Tensor) -> Tensor:
        return self._finish(x)

    def _join_pixels(self, decoder: nn.Module, arguments: Any, x: Tensor) -> Tensor:
        return self._finish(x, self._to_first)

    def _finish(self, x: Tensor, to_first: bool = False) -> Tensor:
        x = self._joined(x, to_first) if self._shares else x
        self._shares = ()
        return x

    def _own(self, x: Tensor) -> Tensor:
        """Return this rank's rows of "… h w", at any resolution."""
        scale = x.shape[-2] // sum(self._shares)
        return x.split([rows * scale for rows in self._shares], dim=-2)[self.rank].contiguous()

    def _joined(self, x: Tensor, to_first: bool = False) -> Tensor:
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

    def _gather_frames(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._joined(arguments[0]), *arguments[1:]) if self._shares else None

    def _take_own(self, module: nn.Module, arguments: Any, x: Tensor) -> Tensor | None:
        return self._own(x) if self._shares else None

    def _with_halo(self, module: nn.Module, crop: int) -> None:
        """Give a layer one more row on either side, and crop what it makes of them from its result."""

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x, *rest = arguments
            return (self._with_neighbours(x), *rest) if self._shares else None

        def after(module: nn.Module, arguments: Any, x: Tensor) -> Tensor | None:
            return x[..., crop:-crop, :] if self._shares else None

        self._around(module, before, after)

    def _with_row_below(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give a layer that halves the rows the next row below; it pads the picture itself."""
        if not self._shares:
            return None
        x, *rest = arguments
        _, below = self._neighbours(x, from_above=False)
        return (x if below is None else torch.cat([x, below], dim=-2), *rest)

    def _clear_beyond(self, module: nn.Module, arguments: Any, x: Tensor) -> None:
        """Zero the rows beyond the picture, to which a bias was added."""
        if self._shares and self.rank == 0:
            x[..., :1, :] = 0
        if self._shares and self.rank + 1 == self.ranks:
            x[..., -1:, :] = 0

    def _with_neighbours(self, x: Tensor) -> Tensor:
        """Return "… h w" between the neighbours' nearest rows, zeros beyond the picture."""
        zeros = x.new_zeros(x[..., :1, :].shape)
        above, below = self._neighbours(x)
        return torch.cat([zeros if above is None else above, x, zeros if below is None else below], dim=-2)

    def _neighbours(self, x: Tensor, from_above: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Return the nearest rows "… 1 w" of the ranks above, if asked for, and below."""
        above, below = self.rank > 0, self.rank + 1 < self.ranks
        top, bottom = x[..., :1, :], x[..., -1:, :]
        row = top.numel()
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
        got = x.new_empty(sum(received))
        dist.all_to_all_single(got, parts, received, sent, self.group)
        rows = [part.view(top.shape) for part in got.split(row)] if got.numel() else []
        return (rows.pop(0) if above and from_above else None), (rows.pop(0) if below else None)
