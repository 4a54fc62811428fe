"""The models as diffusers' models: config, adapters, step caches, output objects, hooks of an offload.

Shapes: `b` batch, `c` channels, `t h w` frames, rows and columns.
"""

from collections.abc import Iterable, Iterator
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
from ...models.autoencoder import AutoencoderKLWan
from ...models.transformer import WanTransformer3DModel, WanTransformerBlock
from ...private_apis import (
    active_attention_backend,
    checkpointed,
    choose_attention_backend,
    has_backend_of_diffusers,
    register_block,
)
from ..lora.model import LoraModel, scaled_by_attention_kwargs
from .attention_names import our_name, their_name
from .diffusers_attention import DiffusersAttention

register_block(WanTransformerBlock)


class DiffusersTransformer(
    WanTransformer3DModel, ModelMixin, ConfigMixin, LoraModel, CacheMixin, AttentionMixin
):
    """The transformer with diffusers' mixins; config and state-dict names are those of diffusers 0.42.1."""

    config: Any
    dtype: torch.dtype
    device: torch.device
    attention_class = DiffusersAttention
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

    __init__ = register_to_config(WanTransformer3DModel.__init__)

    @scaled_by_attention_kwargs
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """`wan22.models.transformer.WanTransformer3DModel.forward`, with diffusers' arguments and output.

        `attention_kwargs` {"scale": s} multiplies the loaded LoRAs by s; `return_dict` False returns a tuple.
        """
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        kernel = our_name(active_attention_backend())
        if kernel == "native":
            velocity = super().forward(*inputs)
        else:  # within diffusers' attention_backend(...)
            with preferring(find(kernel, self)):
                velocity = super().forward(*inputs)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

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

    def run_block(self, block: torch.nn.Module, *arguments: Any) -> Tensor:
        """Run a block; with gradient checkpointing, what it computes is computed anew for gradients."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpointed(self, block, *arguments)
        return super().run_block(block, *arguments)


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
        self, frames: Iterable[Tensor], chunk_latents: int = 1
    ) -> Iterator[DiagonalGaussianDistribution]:
        """`wan22.models.autoencoder.AutoencoderKLWan.encode_stream`, whose moments become posteriors."""
        return map(DiagonalGaussianDistribution, super().encode_stream(frames, chunk_latents))

    decode_stream = apply_forward_hook(AutoencoderKLWan.decode_stream)

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
