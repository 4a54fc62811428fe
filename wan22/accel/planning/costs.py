"""What the parts of making a video take in memory and arithmetic, told from shapes before it is done.

Weights are counted to the byte, activations are traced on the meta device.

Shapes: c channels, t h w latent frames, rows and columns, l video tokens, d model size.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...presets import MAX_TEXT_TOKENS
from ..cpu import packed_bytes
from ..offload.layout import Placement, bytes_of, device_bytes
from .trace import on_meta, peak_bytes

TRANSFORMERS = ("transformer", "transformer_2")
ENCODERS = ("text_encoder", "image_encoder")
# Copies of the latents that sampling keeps: noise, prediction, both guidance passes, the solver's history.
LATENT_COPIES = 12


@dataclass
class Task:
    """What is to be made of which models, and what its parts take.

    Args:
        name: of the checkpoint.
        models: on the meta device.
        size: width, height, frames.
        quantize: how the transformers are quantised.
        guided: whether steps have two passes.
        prompts: that a call gets; the keys and values of each may be kept.
        videos: that it makes.
        anonymous: bytes of each model's weights that are in the host's memory and in no file.
    """

    name: str
    models: dict[str, Any]
    size: tuple[int, int, int]
    quantize: str | None
    guided: bool
    prompts: int = 1
    videos: int = 1
    anonymous: Mapping[str, int] = field(default_factory=dict)
    _known: dict[Any, int] = field(default_factory=dict)

    def bytes_of(self, name: str) -> int:
        """Bytes of a model's weights."""
        return self._once(("bytes", name), lambda: bytes_of(self.models[name]))

    def device_bytes(self, name: str, placement: Placement) -> int:
        """Bytes of a model's weights on the device."""
        return self._once((name, placement), lambda: device_bytes(self.models[name], placement))

    @property
    def experts(self) -> list[str]:
        """The names of the transformers that there are."""
        return [name for name in TRANSFORMERS if name in self.models]

    @property
    def encoders(self) -> list[str]:
        """The names of the models that run before the transformers."""
        return [name for name in ENCODERS if name in self.models]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The latents' "t h w"."""
        vae, (width, height, frames) = self.models["vae"], self.size
        stride = vae.spatial_stride
        return 1 + (frames - 1) // vae.temporal_stride, height // stride, width // stride

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height in pixels of one token."""
        _, rows, columns = self.models[self.experts[0]].config.patch_size
        stride = self.models["vae"].spatial_stride
        return columns * stride, rows * stride

    @property
    def tokens(self) -> int:
        """Video tokens l."""
        (width, height, _), (t, _, _) = self.size, self.latent_shape
        return t * (height // self.cell[1]) * (width // self.cell[0])

    def resized(self, size: tuple[int, int, int]) -> "Task":
        """Return the same for another width, height and number of frames."""
        return replace(self, size=size, _known={})

    @property
    def pixels(self) -> int:
        """Bytes of the videos in float32, which the host holds twice at the end."""
        width, height, frames = self.size
        return self.videos * 3 * width * height * frames * 4

    @property
    def packed(self) -> int:
        """Bytes of the weights that the CPU's kernels keep in their own order as well."""
        return sum(packed_bytes(model) for model in self.models.values())

    def text(self, names: Iterable[str]) -> int:
        """Bytes of encoding the longest prompt, or an image, with these encoders, beside weights."""
        return max((self._once(name, partial(_encode, self.models[name])) for name in names), default=0)

    def denoise(self, keep: bool) -> int:
        """Bytes of a step, beside weights."""
        latent = self.models["vae"].config.z_dim * torch.Size(self.latent_shape).numel() * 4
        one = self._step(keep, 1)
        # What is kept of every further prompt is what the second one adds.
        further = (self.prompts - 1) * (self._step(keep, 2) - one) if keep and self.prompts > 1 else 0
        return self.videos * LATENT_COPIES * latent + one + further

    def decode(self, strips: int | None) -> int:
        """Bytes of decoding, beside weights."""
        return self._once(("decode", strips), lambda: self._decode(strips))

    def _once(self, key: Any, measure: Callable[[], int]) -> int:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _step(self, keep: bool, prompts: int) -> int:
        """Measure two and three blocks; every further one adds what the third added: what is kept."""
        model = self.models[self.experts[0]]

        def measure() -> int:
            two, three = (peak_bytes(self._passes, _shortened(model, n), keep, prompts) for n in (2, 3))
            return two + (len(model.blocks) - 2) * (three - two)

        return self._once(("denoise", keep, prompts), measure)

    def _passes(self, model: Any, keep: bool, prompts: int) -> Any:
        call, outputs = on_meta(model), []
        config = model.config
        dtype = model.condition_embedder.text_embedder.linear_1.bias.dtype
        timestep = torch.empty(1, device="meta")
        latents = torch.empty(1, config.in_channels, *self.latent_shape, device="meta")
        image = None
        if config.image_dim is not None:
            shape = (1, config.pos_embed_seq_len or 257, config.image_dim)
            image = torch.empty(shape, device="meta", dtype=dtype)
        for _ in range(prompts * (1 + self.guided)):
            rows = torch.empty(1, MAX_TEXT_TOKENS, config.text_dim, device="meta", dtype=dtype)
            arguments = {"encoder_hidden_states_image": image, "return_dict": False}
            outputs.append(call(latents, timestep, rows, **arguments)[0])
        return outputs

    def _decode(self, strips: int | None) -> int:
        """Measure as many latent frames as there are different steps: the first, the second and the rest."""
        vae, (t, h, w) = self.models["vae"], self.latent_shape
        # A copy, which may have those of a plan before, or tiles, which only take less.
        vae.disable_tiling()
        vae.disable_strips()
        if strips is not None:
            vae.enable_strips(strips)
        dtype = next(vae.parameters()).dtype

        def stream() -> None:
            z = torch.empty(1, vae.config.z_dim, min(t, 3), h, w, device="meta", dtype=dtype)
            for chunk in vae.decode_stream(z):
                chunk[0].float()

        return peak_bytes(stream)

    def step_flops(self) -> float:
        """Floating-point operations of a step."""
        return (1 + self.guided) * forward_flops(self.models[self.experts[0]].config, self.tokens)


def forward_flops(config: Any, tokens: int) -> float:
    """Return the floating-point operations of one call of a transformer, its embeddings aside.

    Args:
        config: of the transformer.
        tokens: video tokens l.
    """
    d = config.num_attention_heads * config.attention_head_dim
    text = 4 * MAX_TEXT_TOKENS * d * d  # keys and values
    linears = 2 * tokens * (6 * d * d + 2 * d * config.ffn_dim) + text
    attention = 4 * tokens * (tokens + MAX_TEXT_TOKENS) * d
    return float(config.num_layers * (linears + attention))


def _shortened(model: Any, blocks: int) -> Any:
    """Return a model with its first blocks only, which shares them with it."""
    short = copy.copy(model)
    short.__dict__["_modules"] = dict(model._modules)
    short.blocks = nn.ModuleList(list(model.blocks)[:blocks])
    return short


def _encode(model: Any) -> int:
    """Bytes of encoding as many tokens as there can be, or an image, beside weights."""
    call, config = on_meta(model), model.config
    dtype = next(model.parameters()).dtype
    if hasattr(config, "num_channels"):
        pixels = (1, config.num_channels, config.image_size, config.image_size)
        return peak_bytes(
            lambda: call(torch.empty(pixels, device="meta", dtype=dtype), output_hidden_states=True)
        )

    def encode() -> Any:
        ids = torch.empty(1, MAX_TEXT_TOKENS, dtype=torch.long, device="meta")
        # Of four axes, so that nobody asks what is in it.
        mask = torch.empty(1, 1, MAX_TEXT_TOKENS, MAX_TEXT_TOKENS, dtype=dtype, device="meta")
        return call(ids, attention_mask=mask).last_hidden_state

    return peak_bytes(encode)
