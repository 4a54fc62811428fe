"""The Wan diffusion transformer: one class for every Wan 2.1 and 2.2 text- and image-to-video checkpoint.

Shapes: b batch, c latent channels, t h w latent frames, rows, columns, l video tokens, s text or image
tokens, k timesteps per sample (1, or t for one per latent frame, or l for one per token), d model size, n
heads.

Precision: the residual stream, norms, time embedding, modulation and head are computed in float32 (float64 in
a float64 model), the large linear layers and attention in the dtype of `encoder_hidden_states`.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import nn

from ..checks import check_positive_int, shown
from ..private_apis import has_hooks, is_hooked
from . import fused
from .attention import check_backend
from .attention_guidance import AttentionGuidance
from .attention_layer import WanAttention
from .embeddings import ConditionEmbedder
from .layers import (
    FeedForward,
    Float32LayerNorm,
    Float32Linear,
    Head,
    Tokens,
    add_gated,
    added_and_normalized,
    at_least_float32,
    normalized,
    unpatchified,
)
from .rope import RotaryTables, rotary_tables
from .self_attention import AttentionKernel, SelfAttention
from .token_stream import Pending, TokenStream, joined, split


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward; the timestep modulates the first and the last."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        cross_attn_norm: bool,
        eps: float,
        added_kv_proj_dim: int | None = None,
        attention_class: type[WanAttention] = WanAttention,
    ) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = attention_class(dim, num_heads, eps)
        self.norm2 = Float32LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = attention_class(dim, num_heads, eps, True, added_kv_proj_dim)
        self.norm3 = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim, dim, approximate="tanh")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.token_chunks = 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: RotaryTables,
        encoder_hidden_states_image: torch.Tensor | None = None,
        pending: Pending | None = None,
        guidance: AttentionGuidance | None = None,
        instead: AttentionKernel | None = None,
    ) -> Any:
        """Refine the residual stream "b l d", float32, by text and (Wan 2.1 I2V) image tokens "b s d".

        The linear layers run in the dtype of the text tokens. `temb` "b k 6 d", float32, is shift, scale and
        gate of self-attention and feed-forward; `rotary_emb` is from `rotary_tables`. With `guidance` the
        text is the prompts' and then the negative ones', "2b s d". `instead` computes self-attention in place
        of the layer's kernel.

        Returns: the stream. With what the block before has left pending, an update "b l d" and its gate
            "b k d", it is a triple: the stream, and the update and gate that this block leaves.
        """
        x, text, image = hidden_states, encoder_hidden_states, encoder_hidden_states_image
        hooked = is_hooked(self.attn2) or is_hooked(self.ffn)
        if self.token_chunks > 1 and self.attn1.attends_in_parts and not hooked:
            return self._in_chunks(x, text, temb, rotary_emb, image, guidance, instead)
        dtype = text.dtype
        shift1, scale1, gate1, shift3, scale3, gate3 = (self.scale_shift_table + temb).unbind(2)
        # No name is given to what attention returns, which would keep it in memory.
        if pending is None:
            y = normalized(self.norm1, x, scale1, shift1, dtype)
        else:
            x, y = added_and_normalized(self.norm1, x, *pending, scale1, shift1, dtype)
        y = self.attn1(y, rotary=rotary_emb, instead=instead)
        x, y = added_and_normalized(self.norm2, x, y, gate1, None, None, dtype)
        x, y = added_and_normalized(
            self.norm3, x, self.attn2(y, text, image, guidance=guidance), None, scale3, shift3, dtype
        )
        return add_gated(x, self.ffn(y), gate3) if pending is None else (x, self.ffn(y), gate3)

    @property
    def leaves_updates(self) -> bool:
        """Whether its last update may be added by the next block's first kernel: nobody else sees it."""
        own, put_there = type(self).forward is WanTransformerBlock.forward, vars(self).get("forward")
        plain = own and (put_there is None or getattr(put_there, "is_compiled", False))
        return plain and not has_hooks(self) and self.token_chunks == 1

    def _in_chunks(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        rotary: RotaryTables,
        image: torch.Tensor | None,
        guidance: AttentionGuidance | None,
        instead: AttentionKernel | None,
    ) -> torch.Tensor:
        """Do what `forward` does for some tokens after the others, but for self-attention's products."""
        shift1, scale1, gate1, shift3, scale3, gate3 = (self.scale_shift_table + temb).unbind(2)
        tokens, times, dtype = x.shape[1], temb.shape[1], text.dtype
        run = tokens // times  # tokens that share a time
        step = -(-tokens // self.token_chunks)
        step = step if times == 1 else -(-step // run) * run

        def at(e: torch.Tensor, part: slice) -> torch.Tensor:
            return e if times == 1 else e[:, part.start // run : part.stop // run]

        def normalised(part: slice) -> torch.Tensor:
            return normalized(self.norm1, x[:, part], at(scale1, part), at(shift1, part), dtype)

        parts = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        out = self.attn1.attend(((part, normalised(part)) for part in parts), tokens, rotary, instead)
        result = torch.empty_like(x)
        for part in parts:
            y = self.attn1.to_out[0](out[:, part].flatten(2))
            z, y = added_and_normalized(self.norm2, x[:, part], y, at(gate1, part), None, None, dtype)
            y = self.attn2(y, text, image, guidance=guidance)
            modulation = at(scale3, part), at(shift3, part)
            z, y = added_and_normalized(self.norm3, z, y, None, *modulation, dtype)
            result[:, part] = add_gated(z, self.ffn(y), at(gate3, part))
        return result


class WanTransformer3DModel(nn.Module):
    """Predicts the flow velocity of noisy video latents.

    Args:
        patch_size: latent frames, rows and columns of one token.
        attention_head_dim: channels of one head; d = num_attention_heads times this.
        in_channels: 16 (T2V), 36 (I2V: 16 noisy, 4 mask, 16 image), 48 (TI2V-5B).
        out_channels: 16, or 48 for TI2V-5B.
        text_dim: width of a text token from the encoder.
        freq_dim: channels of the sinusoidal time embedding.
        ffn_dim: hidden size of the feed-forward.
        cross_attn_norm: whether cross-attention's input is normalised.
        qk_norm: "rms_norm_across_heads", the only one Wan uses.
        image_dim, added_kv_proj_dim: width of a CLIP token, and inside the blocks (Wan 2.1 I2V).
        rope_max_seq_len: largest number of tokens along one axis.
        pos_embed_seq_len: image tokens of first and last frame together (Wan 2.1 FLF).
    Source: Wan2.2 wan/modules/model.py, WanModel; names are those of diffusers 0.42.1.
    """

    attention_class = WanAttention
    samples_in_turn = False  # see set_samples_in_turn

    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(
                f"qk_norm={shown(qk_norm)} is not a Wan transformer; it must be 'rms_norm_across_heads'."
            )
        self.patch_size = cast(tuple[int, int, int], tuple(patch_size))
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.head_dim, self.rope_max_seq_len = attention_head_dim, rope_max_seq_len
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch_size, self.patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, image_dim, pos_embed_seq_len)
        self.blocks = nn.ModuleList(
            WanTransformerBlock(
                *(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, added_kv_proj_dim),
                attention_class=self.attention_class,
            )
            for _ in range(num_layers)
        )
        self.tokens, self.head = Tokens(), Head()
        self.norm_out = Float32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = Float32Linear(dim, self.out_channels * math.prod(self.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        return_residual: bool = False,
        *,
        skip_layers: Collection[int] = (),
        encoder_hidden_states_negative: torch.Tensor | None = None,
        attention_guidance: AttentionGuidance | None = None,
        self_attention: SelfAttention | None = None,
    ) -> Any:
        """Predict the flow velocity of noisy latents.

        Args:
            hidden_states: noisy latents, "b c t h w"; t, h and w are multiples of the patch.
            timestep: "b" or "b 1"; for TI2V-5B also "b t", one value per latent frame, or "b l", one per
                token; 0 to 1000 (pure noise). Never rounded: it is used in float64.
            encoder_hidden_states: text tokens, "b s text_dim", in the dtype that the large linear layers run
                in. Wan is trained on 512 tokens, zero past the prompt's end, and attends to all of them.
            encoder_hidden_states_image: CLIP tokens of Wan 2.1 I2V, "b s image_dim".
            residual: what is added to the tokens in place of running the blocks, "b l d".
            return_residual: whether to return, too, what the blocks add, "b l d" float32.
            skip_layers: indices of blocks that do not run.
            encoder_hidden_states_negative: text that cross-attention keeps away from, "b s text_dim".
            attention_guidance: how it does so; both are given, or neither.
            self_attention: what computes layers' self-attention in place of their kernels.
        Returns: velocity, "b out_channels t h w", float32 (float64 in a float64 model); or it and the
            residual.
        Raises: ValueError: a shape is not as above.
        Source: Wan2.2 wan/modules/model.py, WanModel.forward.
        """
        grid = self._token_grid(hidden_states, timestep)
        text = encoder_hidden_states, encoder_hidden_states_image, encoder_hidden_states_negative
        given = (hidden_states, timestep, *text)
        samples = split(given) if self.samples_in_turn else [given]
        streams = [self._embed(attention_guidance, *sample) for sample in samples]
        starts = [stream.x for stream in streams] if return_residual else []
        if residual is None:
            rotary = self.rotary(samples[0][0], grid, at_least_float32(encoder_hidden_states.dtype))
            device = streams[0].x.device
            kernels = [
                None if self_attention is None else self_attention.kernel_of(layer, grid, device)
                for layer in range(len(self.blocks))
            ]
            self._run_blocks(streams, rotary, skip_layers, kernels)
        else:
            for stream, part in zip(streams, residual.chunk(len(streams)), strict=True):
                stream.skip_blocks(part)
        velocity = joined([self._velocity(stream, grid) for stream in streams])
        residuals = [stream.residual(start) for stream, start in zip(streams, starts, strict=False)]
        return (velocity, joined(residuals)) if return_residual else velocity

    def _run_blocks(
        self,
        streams: Sequence[TokenStream],
        rotary: RotaryTables,
        skip_layers: Collection[int],
        self_attention: Sequence[AttentionKernel | None],
    ) -> None:
        """Advance streams by the blocks, each block by all streams before the next one."""
        self._leave_updates(streams)
        for i, (block, kernel) in enumerate(zip(self.blocks, self_attention, strict=True)):
            for stream in streams if i not in skip_layers else ():
                self._advance(stream, block, rotary, kernel)
        for stream in streams:
            stream.settle()

    def _embed(
        self,
        guidance: AttentionGuidance | None,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None,
        negative: torch.Tensor | None,
    ) -> TokenStream:
        """Embed what `forward` is given."""
        dtype = at_least_float32(text.dtype)
        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        x = self.tokens(rearrange(x, "b d t h w -> b (t h w) d").to(dtype).contiguous())
        temb, modulation = self.condition_embedder.embed_time(timestep, dtype)
        embed_text = self.condition_embedder.text_embedder
        text = embed_text(text) if negative is None else torch.cat((embed_text(text), embed_text(negative)))
        image = None if image is None else self.condition_embedder.embed_image(image)
        return TokenStream(x, text, image, temb, modulation, guidance=guidance)

    def _leave_updates(self, streams: Iterable[TokenStream]) -> None:
        """Let each block's last update be added by the kernel that reads it, if blocks are fused anyway."""
        for stream in streams:
            if fused.applies(stream.x, stream.text) and all(block.leaves_updates for block in self.blocks):
                nothing = torch.zeros_like(stream.x, dtype=stream.text.dtype)
                stream.pending = nothing, torch.zeros_like(stream.modulation)[:, :, 5]

    def _advance(
        self, stream: TokenStream, block: nn.Module, rotary: RotaryTables, kernel: AttentionKernel | None
    ) -> None:
        arguments: list[Any] = [stream.x, stream.text, stream.modulation, rotary, stream.image]
        arguments += [stream.pending, stream.guidance, kernel]
        while len(arguments) > 5 and arguments[-1] is None:  # blocks of others take the first ones alone
            arguments.pop()
        if stream.pending is None:
            stream.x = self.run_block(block, *arguments)
        else:
            stream.x, *pending = self.run_block(block, *arguments)
            stream.pending = pending[0], pending[1]

    def _velocity(self, stream: TokenStream, grid: tuple[int, int, int]) -> torch.Tensor:
        """Return the velocity that the last block's tokens stand for."""
        # With the blocks spread over devices, the stream ends on another one than it started on.
        return unpatchified(
            self.head(stream.x, stream.temb.to(stream.x.device), self._finish), grid, self.patch_size
        )

    def _finish(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Map the last block's tokens "b l d" to patches of velocity "b l (pt ph pw c)"."""
        shift, scale = (self.scale_shift_table.to(x.device) + temb[:, :, None]).unbind(2)
        return cast(torch.Tensor, self.proj_out(normalized(self.norm_out, x, scale, shift, None)))

    def rotary(self, latents: torch.Tensor, grid: tuple[int, int, int], dtype: torch.dtype) -> RotaryTables:
        """Return the rotary tables of a grid of tokens, see `rope.rotary_tables`."""
        return rotary_tables(grid, self.head_dim, latents.device, dtype)

    def run_block(self, block: nn.Module, *arguments: Any) -> Any:
        """Return what a block makes of its arguments."""
        return block(*arguments)

    def set_token_chunks(self, chunks: int = 16) -> None:
        """Let blocks compute one part of the tokens after the other, which takes less memory; 1 undoes it.

        Self-attention still sees all of them: the result is equal up to rounding, with half the activations.
        Blocks whose layers have hooks or processors of others compute as before.

        Raises: ValueError: chunks is below 1.
        """
        chunks = check_positive_int("chunks", chunks)
        for block in self.blocks:
            block.token_chunks = chunks  # type: ignore[assignment]

    def set_samples_in_turn(self, enabled: bool = True) -> None:
        """Let each block compute the samples of a batch one after the other, not together.

        Each sample's result is, to the bit, that of a call of its own; weights that pass through buffers as
        blocks need them come once for all samples.
        """
        self.samples_in_turn = enabled

    def set_attention_backend(self, backend: str) -> None:
        """Choose all layers' attention kernel: "native" or a name registered by `wan22.accel.attention`."""
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, WanAttention):
                module.backend = backend

    def reset_attention_backend(self) -> None:
        """Let PyTorch's own kernel compute attention again."""
        self.set_attention_backend("native")

    def _token_grid(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> tuple[int, int, int]:
        """Check the inputs' shapes and return the number of tokens along t, h, w."""
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.in_channels:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; it must be 'b c t h w' with c = "
                f"{self.in_channels}."
            )
        sizes = hidden_states.shape[2:]
        for name, size, patch in zip("thw", sizes, self.patch_size, strict=True):
            if size % patch:
                raise ValueError(
                    f"latent {name} is {size}; it must be a multiple of {patch}: {size // patch * patch} is."
                )
        t, h, w = (size // patch for size, patch in zip(sizes, self.patch_size, strict=True))
        if max(t, h, w) > self.rope_max_seq_len:
            raise ValueError(f"{t} x {h} x {w} tokens: at most {self.rope_max_seq_len} fit along one axis.")
        b = hidden_states.shape[0]
        if tuple(timestep.shape) not in ((b,), (b, 1), (b, t), (b, t * h * w)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; it must be ({b},), ({b}, 1), for one value per "
                f"latent frame ({b}, {t}), or for one per token ({b}, {t * h * w})."
            )
        return t, h, w
