"""The attention layer as diffusers' models have it: with a processor that can be replaced, fused projections.

Shapes: b batch, l video tokens, s text or image tokens, n heads, d head size, m model size.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from ...models.attention_guidance import AttentionGuidance
from ...models.attention_layer import WanAttention
from ...models.rope import RotaryTables
from ...models.self_attention import AttentionKernel
from ...presets import MAX_TEXT_TOKENS

Processor = Callable[..., Tensor]


class WanAttnProcessor:
    """Computes an attention layer as wan22 does; what each layer has until another is set.

    Called as diffusers' processors are: with text tokens behind image tokens, and rotary tables "1 l 1 d" in
    which each value stands twice.
    """

    def __call__(
        self,
        attn: "DiffusersAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: RotaryTables | None = None,
    ) -> Tensor:
        """Return "b l m" for the layer's input "b l m" and, in cross-attention, context tokens "b s m"."""
        if attention_mask is not None:
            raise ValueError("attention_mask is given; Wan attends to all tokens, so it must be None")
        image = None
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            image, encoder_hidden_states = _parted(encoder_hidden_states)
        if rotary_emb is not None:
            rotary_emb = rotary_emb[0][..., ::2], rotary_emb[1][..., ::2]
        return WanAttention.forward(attn, hidden_states, encoder_hidden_states, image, rotary_emb)


class DiffusersAttention(WanAttention, AttentionModuleMixin):
    """The layer with a processor: wan22's, or one that was written for diffusers' WanAttention."""

    processor: Processor
    fused_projections: bool
    to_qkv: nn.Linear
    to_kv: nn.Linear
    to_added_kv: nn.Linear
    _default_processor_cls = WanAttnProcessor
    _available_processors = [WanAttnProcessor]

    def __init__(self, dim: int, *arguments: Any, **options: Any) -> None:
        super().__init__(dim, *arguments, **options)
        self.inner_dim = self.kv_inner_dim = dim
        self.cross_attention_dim_head = dim // self.heads if self.is_cross_attention else None
        self.added_kv_proj_dim = None if self.add_k_proj is None else self.add_k_proj.in_features
        self._rounding: list[Any] = []
        self.set_processor(None)

    def set_processor(self, processor: Processor | None) -> None:
        """Let a processor compute the layer; None: wan22's own.

        Another's gets queries and keys in its input's dtype from the norms, as diffusers' norms give them.
        """
        processor = WanAttnProcessor() if processor is None else processor
        if not callable(processor):
            raise ValueError(f"{type(processor).__name__} is no attention processor; it must be callable")
        super().set_processor(processor)
        for handle in self._rounding:
            handle.remove()
        norms = [getattr(self, name, None) for name in ("norm_q", "norm_k", "norm_added_k")]
        foreign = not isinstance(processor, WanAttnProcessor)
        self._rounding = [norm.register_forward_hook(_as_input) for norm in norms if norm and foreign]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        image: Tensor | None = None,
        rotary: RotaryTables | None = None,
        guidance: AttentionGuidance | None = None,
        instead: AttentionKernel | None = None,
    ) -> Tensor:
        """`wan22.models.attention_layer.WanAttention.forward`, by the layer's processor.

        Raises: ValueError: attention is guided or sparse, and the processor is another's, which does not know
            how.
        """
        if type(self.processor) is WanAttnProcessor:
            return super().forward(x, context, image, rotary, guidance, instead)
        if instead is not None:
            raise ValueError(f"{type(self.processor).__name__} computes dense self-attention alone")
        if guidance is not None:
            raise ValueError(f"{type(self.processor).__name__} cannot keep attention away from a text")
        if image is not None and context is not None:
            context = torch.cat((image, context), dim=1)
        if rotary is not None:
            rotary = rotary[0].repeat_interleave(2, dim=-1), rotary[1].repeat_interleave(2, dim=-1)
        return self.processor(self, x, context, None, rotary)

    @property
    def attends_in_parts(self) -> bool:
        """See WanAttention; only wan22's own processor does."""
        return super().attends_in_parts and type(self.processor) is WanAttnProcessor

    def set_attention_backend(self, backend: str) -> None:
        """Choose the layer's kernel, by wan22's name; see `WanTransformer3DModel.set_attention_backend`."""
        self.backend = backend

    # ---- fused projections ----

    def project(self, x: Tensor, context: Tensor, rotary: RotaryTables | None) -> tuple[Tensor, ...]:
        """Return queries "b l n d", keys and values "b s n d"."""
        parts = (self.to_q, self.to_k, self.to_v)
        if not self.fused_projections or any(type(part) is not nn.Linear for part in parts):  # LoRAs since
            return super().project(x, context, rotary)
        if self.is_cross_attention:
            query = self.to_q(x)
            key, value = self.to_kv(context).chunk(2, dim=-1)
        else:
            query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        query, key = self._normalised(self.norm_q, query, rotary), self._normalised(self.norm_k, key, rotary)
        return query, key, self._heads(value)

    def project_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values "b s n d" of image tokens."""
        if not self.fused_projections:
            return super().project_image(image)
        key, value = self.to_added_kv(image).chunk(2, dim=-1)
        return self._normalised(self.norm_added_k, key), self._heads(value)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Compute queries, keys and values of one input by one product, whose weights are copies.

        Raises: ValueError: a layer is quantised, or has LoRAs.
        """
        if self.fused_projections:
            return
        fused = {"to_qkv": ["to_q", "to_k", "to_v"]}
        if self.is_cross_attention:
            fused = {"to_kv": ["to_k", "to_v"]}
        if self.add_k_proj is not None:
            fused["to_added_kv"] = ["add_k_proj", "add_v_proj"]
        layers = {name: _fused([getattr(self, part) for part in parts]) for name, parts in fused.items()}
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.fused_projections = True

    def unfuse_projections(self) -> None:
        """Use the projections as they are again."""
        for name in ("to_qkv", "to_kv", "to_added_kv"):
            if hasattr(self, name):
                delattr(self, name)
        self.fused_projections = False


class FusedLinear(nn.Linear):
    """Several linear layers of one input in one; it is not saved, as its weights are copies."""

    def _save_to_state_dict(self, *arguments: Any) -> None: ...

    def _load_from_state_dict(self, *arguments: Any) -> None: ...


def _fused(layers: list[Any]) -> FusedLinear:
    for layer in layers:
        if type(layer) is not nn.Linear or hasattr(layer.weight, "__tensor_flatten__"):
            kind = type(layer).__name__
            raise ValueError(f"a {kind} cannot be fused with others; fuse before LoRAs and quantisation")
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    fused = FusedLinear(weight.shape[1], weight.shape[0], device="meta")
    trained = layers[0].weight.requires_grad
    fused.weight, fused.bias = nn.Parameter(weight, trained), nn.Parameter(bias, trained)
    return fused


def _parted(tokens: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return image and text tokens of both, as diffusers parts them: the last 512 are text."""
    image = tokens.shape[1] - MAX_TEXT_TOKENS
    return (tokens[:, :image], tokens[:, image:]) if image > 0 else (None, tokens)


def _as_input(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)
