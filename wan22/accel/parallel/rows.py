"""An autoencoder's rows shared among ranks while it decodes; the result is that of one rank, up to rounding.

Each rank has a run of the rows, at every resolution. A convolution sees one row more on either side, which
the neighbours send; beyond the picture there are zeros, as ever. Attention in the middle sees whole frames,
which are put together for it, at the lowest resolution.

Shapes: b batch, c channels, t h w frames, rows, columns, of all ranks together or of one.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn

from ...models.autoencoder_layers import AttentionBlock, CausalConv3d, Upsample
from ...models.temporal_cache import TemporalCache
from ..methods import is_own, put
from .mesh import gathered


class RowParallel:
    """Shares an autoencoder's rows among ranks while it decodes, until detached.

    All ranks decode the same latents, and get the same frames. Videos of fewer latent rows than ranks, and
    those that are decoded in tiles or strips, each rank decodes by itself.

    Args:
        vae: an AutoencoderKLWan.
        group: the ranks.

    Raises:
        ValueError: decode_chunk is replaced already, by a compilation say.
    """

    def __init__(self, vae: Any, group: Any) -> None:
        if not is_own(vae, "decode_chunk"):
            raise ValueError(
                "the VAE is compiled, or its rows are shared already; pipe.compile(vae=False) leaves it alone"
            )
        self.vae, self.group = vae, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._shares: tuple[int, ...] = ()  # rows of each rank, of the latents that are being decoded
        self._handles: list[Any] = []
        for module in vae.decoder.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[1] > 1:
                self._see_beyond(module, crop=1)
            elif isinstance(module, Upsample):  # which doubles what it sees
                self._see_beyond(module, crop=2)
                if module.time_conv is not None:
                    self._handles.append(module.time_conv.register_forward_hook(self._clear_beyond))
            elif isinstance(module, AttentionBlock):
                self._handles.append(module.register_forward_pre_hook(self._put_together))
                self._handles.append(module.register_forward_hook(self._take_part))
        put(vae, "decode_chunk", self._decode_chunk)

    def detach(self) -> None:
        """Let each rank decode by itself, as before."""
        for handle in self._handles:
            handle.remove()
        vars(self.vae).pop("decode_chunk", None)
        self._handles = []

    def _decode_chunk(
        self, vae: Any, z: torch.Tensor, cache: TemporalCache | None = None
    ) -> tuple[torch.Tensor, TemporalCache | None]:
        """Decode this rank's rows of "b c t h w", and put those of all ranks together."""
        rows = z.shape[3]
        if rows < self.ranks:
            return type(vae).decode_chunk(vae, z, cache)
        bounds = [rank * rows // self.ranks for rank in range(self.ranks + 1)]
        self._shares = tuple(stop - start for start, stop in pairwise(bounds))
        try:
            part, cache = type(vae).decode_chunk(vae, self._own(z), cache)
            return self._whole(part, vae.spatial_stride), cache
        finally:
            self._shares = ()

    # ---- rows of ranks ----

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of "b c t h w", at the latents' resolution."""
        start = sum(self._shares[: self.rank])
        return x[:, :, :, start : start + self._shares[self.rank]].contiguous()

    def _whole(self, part: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Put the rows of all ranks together; scale: rows per row of the latents."""
        most = max(self._shares) * scale
        parts = gathered(F.pad(part, (0, 0, 0, most - part.shape[3])), self.group)
        return torch.cat(
            [x[:, :, :, : rows * scale] for x, rows in zip(parts, self._shares, strict=True)], dim=3
        )

    def _put_together(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *rest = arguments
        return (self._whole(x), *rest) if self._shares else None

    def _take_part(self, module: nn.Module, arguments: Any, x: torch.Tensor) -> torch.Tensor | None:
        return self._own(x) if self._shares else None

    # ---- rows of the neighbours ----

    def _see_beyond(self, module: nn.Module, crop: int) -> None:
        """Let a module see a row more on either side; crop: rows of its result that this makes."""

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x, *rest = arguments
            return (self._with_neighbours(x), *rest) if self._shares else None

        def after(module: nn.Module, arguments: Any, x: torch.Tensor) -> torch.Tensor | None:
            return x[..., crop:-crop, :] if self._shares else None

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _clear_beyond(self, module: nn.Module, arguments: Any, x: torch.Tensor) -> None:
        """Make the rows beyond the picture zeros again, to which a bias was added."""
        if self._shares and self.rank == 0:
            x[..., :1, :] = 0
        if self._shares and self.rank + 1 == self.ranks:
            x[..., -1:, :] = 0

    def _with_neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """Return "… h w" with the neighbours' nearest rows around it, zeros where there is none."""
        above, below = self.rank > 0, self.rank + 1 < self.ranks
        edges = ([x[..., :1, :]] if above else []) + ([x[..., -1:, :]] if below else [])
        row = x[..., :1, :].numel()
        sizes = [0] * self.ranks
        for rank, there in ((self.rank - 1, above), (self.rank + 1, below)):
            if there:
                sizes[rank] = row
        sent = torch.cat([edge.flatten() for edge in edges])
        received = collectives.wait_tensor(collectives.all_to_all_single(sent, sizes, sizes, self.group))
        rows = list(received.split(row))
        shape = x[..., :1, :].shape
        top = rows.pop(0).view(shape) if above else x.new_zeros(shape)
        bottom = rows.pop(0).view(shape) if below else x.new_zeros(shape)
        return torch.cat([top, x, bottom], dim=-2)
