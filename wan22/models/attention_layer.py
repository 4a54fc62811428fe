"""The attention layer: self-attention among video tokens, or cross-attention to text and image tokens.

Shapes: b batch, l video tokens, s text or image tokens, n heads, d head size or model size.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import nn

from ..private_apis import is_hooked
from .attention import attention
from .attention_guidance import AttentionGuidance
from .layers import Float32RMSNorm, rms_normalized
from .rope import RotaryTables
from .self_attention import AttentionKernel


class WanAttention(nn.Module):
    """Multi-head attention with queries and keys normalised over all heads together."""

    add_k_proj: nn.Linear | None
    add_v_proj: nn.Linear | None

    def __init__(
        self, dim: int, heads: int, eps: float, cross: bool = False, added_kv_proj_dim: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.is_cross_attention = heads, cross
        self.backend = "native"  # the attention kernel, see set_attention_backend
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])  # as diffusers' Linear and Dropout
        self.norm_q = Float32RMSNorm(dim, eps=eps)
        self.norm_k = Float32RMSNorm(dim, eps=eps)
        self.add_k_proj = self.add_v_proj = None
        if added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(added_kv_proj_dim, dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, dim)
            self.norm_added_k = Float32RMSNorm(dim, eps=eps)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        rotary: RotaryTables | None = None,
        guidance: AttentionGuidance | None = None,
        instead: AttentionKernel | None = None,
    ) -> torch.Tensor:
        """Attend from the video tokens x "b l d" to themselves, or to text tokens "b s d" as the context.

        In Wan 2.1 I2V, image tokens "b s d" are attended to separately and the results are added; without
        projections of their own they are context like the text. `rotary` has cosine and sine for queries and
        keys. With `guidance` the context is the prompts' and then the negative ones', "2b s d". `instead`
        computes self-attention in place of the layer's kernel.
        """
        context = x if context is None else context
        if image is not None and self.add_k_proj is None:
            image = image if guidance is None else image.repeat(2, 1, 1)
            context, image = torch.cat((image, context), dim=1), None
        # Queries, keys and values are gone before the last product.
        attended = self._attended(x, context, image, rotary, guidance, instead)
        return self.to_out[0](rearrange(attended, "b l n d -> b l (n d)"))

    def _attended(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        image: torch.Tensor | None,
        rotary: RotaryTables | None,
        guidance: AttentionGuidance | None,
        instead: AttentionKernel | None,
    ) -> torch.Tensor:
        query, key, value = self.project(x, context, rotary)
        if guidance is None:
            out = attention(query, key, value, self.backend, instead)
        else:
            texts = zip(key.chunk(2), value.chunk(2), strict=True)
            out = guidance(*(attention(query, *text, self.backend) for text in texts))
        if image is not None:
            out = out + attention(query, *self.project_image(image), self.backend)
        return out

    def project(
        self, x: torch.Tensor, context: torch.Tensor, rotary: RotaryTables | None
    ) -> tuple[torch.Tensor, ...]:
        """Return queries "b l n d", keys and values "b s n d".

        Each is finished before the next begins: what is raw or in float32 is in memory once, not three times.
        """
        query = self._normalised(self.norm_q, self.to_q(x), rotary)
        key = self._normalised(self.norm_k, self.to_k(context), rotary)
        return query, key, self._heads(self.to_v(context))

    @property
    def attends_in_parts(self) -> bool:
        """Whether `attend` computes what `forward` does: nothing has been put around the layer."""
        return not is_hooked(self)

    def attend(
        self,
        parts: Iterable[tuple[slice, torch.Tensor]],
        tokens: int,
        rotary: RotaryTables,
        instead: AttentionKernel | None = None,
    ) -> torch.Tensor:
        """Attend from l video tokens, given part by part, to themselves; return "b l n d", not projected.

        Parts are "b p d" with their places. Besides queries, keys and values only one part is in memory.
        """
        whole: list[torch.Tensor] = []
        for part, x in parts:
            found = self.project(x, x, (rotary[0][:, part], rotary[1][:, part]))
            whole = whole or [each.new_empty(len(each), tokens, *each.shape[2:]) for each in found]
            for target, each in zip(whole, found, strict=True):
                target[:, part] = each
        query, key, value = whole
        return attention(query, key, value, self.backend, instead)

    def project_image(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values "b s n d" of image tokens."""
        assert self.add_k_proj is not None and self.add_v_proj is not None, "image tokens have projections"
        key = self._normalised(self.norm_added_k, self.add_k_proj(image))
        return key, self._heads(self.add_v_proj(image))

    def _normalised(
        self, norm: nn.Module, x: torch.Tensor, rotary: RotaryTables | None = None
    ) -> torch.Tensor:
        """Return queries or keys "b l n d" of the projected "b l d", in its dtype."""
        return self._heads(rms_normalized(norm, x, rotary))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b l (n d) -> b l n d", n=self.heads)
