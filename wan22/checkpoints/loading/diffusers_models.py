"""The models as diffusers' models: config, adapters, step caches, output objects, hooks of an offload.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ...models.attention import find, preferring
from ...models.autoencoder import AutoencoderKLWan, Caches
from ...models.layers import at_least_float32
from ...models.rope import RotaryTables, rotary_tables
from ...models.temporal_cache import TemporalCache
from ...models.transformer import WanTransformer3DModel, WanTransformerBlock
from ...private_apis import (
    active_attention_backend,
    checkpointed,
    choose_attention_backend,
    has_backend_of_diffusers,
    hooks_of,
    register_block,
)
from ..lora.model import LoraModel, scaled_by_attention_kwargs
from .attention_names import our_name, their_name
from .diffusers_attention import DiffusersAttention
from .diffusers_caches import adapted_cache, attention_caches_of_pass

register_block(WanTransformerBlock)


class DiffusersTransformer(
    WanTransformer3DModel, ModelMixin, ConfigMixin, LoraModel, CacheMixin, AttentionMixin
):
    """The transformer with diffusers' mixins; config and state-dict names are those of diffusers 0.42.1."""

    config: Any
    dtype: torch.dtype
    device: torch.device
    attention_class = DiffusersAttention
    disable_cache: Any
    gradient_checkpointing = False  # see enable_gradient_checkpointing

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WanTransformerBlock"]
    _repeated_blocks = ["WanTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "time_embedder", "time_proj", "norm", "proj_out"]
    # What the official code leaves in float32 under its bf16 autocast, and the patch embedding: it feeds the
    # float32 residual stream, and costs nothing beside a block.
    _keep_in_fp32_modules = [
        *("patch_embedding", "time_embedder", "time_proj", "scale_shift_table", "proj_out"),
        *("norm1", "norm2", "norm3", "norm_q", "norm_k", "norm_added_k"),
    ]
    # Trained along but used nowhere, in the official code as in diffusers: image tokens have no queries.
    _keys_to_ignore_on_load_unexpected = ["norm_added_q"]

    rope: torch.nn.Module  # a caller's own takes its place; called with the latents, as diffusers' is

    @register_to_config
    @wraps(WanTransformer3DModel.__init__)
    def __init__(self, *arguments: Any, **config: Any) -> None:
        super().__init__(*arguments, **config)
        self.rope = RotaryEmbedding(self.head_dim, self.patch_size)

    @scaled_by_attention_kwargs
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        residual: Tensor | None = None,
        return_residual: bool = False,
        **options: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """`wan22.models.transformer.WanTransformer3DModel.forward`, with diffusers' arguments and output.

        `attention_kwargs` {"scale": s} multiplies the loaded LoRAs by s; `return_dict` False returns a tuple,
        which `return_residual` needs; `options` are that forward's other arguments.
        """
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        kernel = our_name(active_attention_backend())
        if kernel == "native":
            found = super().forward(*inputs, residual, return_residual, **options)
        else:  # within diffusers' attention_backend(...)
            with preferring(find(kernel, self)):
                found = super().forward(*inputs, residual, return_residual, **options)
        outputs = found if return_residual else (found,)
        return Transformer2DModelOutput(sample=outputs[0]) if return_dict else outputs

    def set_attention_backend(self, backend: str) -> None:
        """Choose all layers' attention kernel.

        Args:
            backend: wan22's name or diffusers', see `wan22.accel.attention`; "auto" is the fastest exact one.

        Raises: ValueError: wan22 has no such kernel, or it cannot be used here.
        """
        name = find(our_name(backend), self)
        super().set_attention_backend(name)
        for layer in self.modules():
            if has_backend_of_diffusers(layer):  # a caller's processor
                choose_attention_backend(layer, their_name(name))

    def rotary(self, latents: Tensor, grid: tuple[int, int, int], dtype: torch.dtype) -> RotaryTables:
        """Return the tables "1 l 1 d/2" of the module `rope`, in which each value stands twice."""
        cos, sin = self.rope(latents)
        return cos[..., ::2].to(dtype).contiguous(), sin[..., ::2].to(dtype).contiguous()

    def enable_cache(self, config: Any) -> None:
        """Skip computation by one of diffusers' caches, which keep what they skip by pass and video.

        Raises: ValueError: another is enabled, or it would not change what this transformer computes.
        """
        config = adapted_cache(self, config)
        before = hooks_of(self)
        super().enable_cache(config)
        if not hooks_of(self) - before:
            self.disable_cache()
            raise ValueError(
                f"this {type(config).__name__} fits no layer of a Wan transformer; its layers are named like "
                "blocks.0, blocks.0.attn1 (among tokens), blocks.0.attn2 (to text) and proj_out"
            )

    @contextmanager
    def cache_context(self, name: str, **state: Any) -> Iterator[None]:
        """Tell step caches which pass runs, "cond" say, and where in the schedule."""
        with super().cache_context(name, **state), attention_caches_of_pass(self, name):
            yield

    def enable_parallelism(self, **options: Any) -> None:
        """Refuse diffusers' way to share a transformer's tokens among ranks, and name wan22's."""
        raise ValueError(
            "enable_parallelism is for diffusers' own attention; wan22.accel.parallel.parallelize(pipe, "
            "ulysses=2) shares the tokens among ranks, and from_pretrained(parallel='auto') all that can be"
        )

    def run_block(self, block: torch.nn.Module, *arguments: Any) -> Any:
        """Run a block; with gradient checkpointing, what it computes is computed anew for gradients."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpointed(self, block, *arguments)
        return super().run_block(block, *arguments)


class RotaryEmbedding(torch.nn.Module):
    """The rotary tables of a grid of tokens, as diffusers' transformer has them."""

    def __init__(self, head_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.attention_head_dim, self.patch_size = head_dim, patch_size

    def forward(self, hidden_states: Tensor) -> RotaryTables:
        """Return cosine and sine "1 l 1 d", each value twice, for latents "b c t h w"; float32 or wider."""
        t, h, w = (n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        dtype = at_least_float32(hidden_states.dtype)
        tables = rotary_tables((t, h, w), self.attention_head_dim, hidden_states.device, dtype)
        return tables[0].repeat_interleave(2, dim=-1), tables[1].repeat_interleave(2, dim=-1)


class DiffusersAutoencoder(AutoencoderKLWan, ModelMixin, ConfigMixin):
    """The autoencoder with diffusers' mixins; config and state-dict names are those of diffusers 0.42.1.

    Its methods are hooked, as what brings an offloaded model to its device knows only of `forward` otherwise.
    """

    config: Any
    device: torch.device

    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    __init__ = register_to_config(AutoencoderKLWan.__init__)
    dtype = ModelMixin.dtype  # layerwise casting computes in another dtype than that of the parameters

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True, chunk_latents: int | None = 1
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """`wan22.models.autoencoder.AutoencoderKLWan.encode`, whose moments become a posterior."""
        posterior = DiagonalGaussianDistribution(super().encode(x, chunk_latents))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, chunk_latents: int | None = 1
    ) -> DecoderOutput | tuple[Tensor]:
        """`wan22.models.autoencoder.AutoencoderKLWan.decode`, in diffusers' output object or a tuple."""
        sample = super().decode(z, chunk_latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def encode_stream(
        self, frames: Iterable[Tensor], chunk_latents: int = 1, caches: Caches = TemporalCache
    ) -> Iterator[DiagonalGaussianDistribution]:
        """`wan22.models.autoencoder.AutoencoderKLWan.encode_stream`, whose moments become posteriors."""
        return map(DiagonalGaussianDistribution, super().encode_stream(frames, chunk_latents, caches))

    decode_stream = apply_forward_hook(AutoencoderKLWan.decode_stream)

    @apply_forward_hook
    def tiled_encode(self, x: Tensor) -> Tensor:
        """Encode a clip in tiles, whether or not that is enabled; the moments "b 2c t h w"."""
        return super().encode(x, tiled=True)

    @apply_forward_hook
    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents in tiles, whether or not that is enabled."""
        sample = super().decode(z, tiled=True)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def clear_cache(self) -> None:
        """Do nothing: between calls the model holds no history of a clip, as diffusers' does."""

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent row and column."""
        return self.spatial_stride

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames per latent frame."""
        return self.temporal_stride

    @property
    def temperal_downsample(self) -> list[bool]:
        """Whether each step down halves time as well."""
        return list(self.config.temperal_downsample)

    @property
    def temperal_upsample(self) -> list[bool]:
        """Whether each step up doubles time as well."""
        return self.temperal_downsample[::-1]

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encode and decode a clip "b 3 t h w" in [-1, 1], through the posterior's mean or a sample of it."""
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)
