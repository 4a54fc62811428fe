"""Memory and arithmetic of each part of a call, from shapes alone.

Weights are counted to the byte; activations are traced on the meta device.

Shapes: b batch, c channels, t h w latent frames and cells, l video tokens, d model size.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ...checkpoints.loading.models import is_ours
from ...models.autoencoder import Caches, strides_of
from ...models.temporal_cache import TemporalCache
from ...presets import MAX_TEXT_TOKENS, TI2V_5B
from ...private_apis import use_native_attention
from ..offload.histories import HostHistories
from ..offload.layout import Placement, blocks_of, bytes_of, device_bytes
from ..quantization.layers import is_quantized
from ..quantization.settings import Quantization
from .meta_models import meta_copy
from .passes import PLAIN, Passes, PassKind, grouped
from .trace import TracedDevice, peak_bytes

TRANSFORMERS = ("transformer", "transformer_2")
ENCODERS = ("text_encoder", "image_encoder")
# Copies of the latents that sampling keeps: noise, prediction, both guidance passes, the solver's history.
LATENT_COPIES = 12


class Peak(NamedTuple):
    """Bytes of the device that a part of a call takes beyond weights, and of the host."""

    device: int
    host: int


@dataclass
class Task:
    """The videos of one call and the models that make them, with the bytes that each part takes."""

    name: str
    models: dict[str, Any]  # on the meta device, by component name
    size: tuple[int, int, int]  # width, height, frames
    quantize: Quantization | None  # the transformers' quantisation
    step_passes: Passes  # of each video, in the step that takes the most
    videos: int = 1
    residuals: int = 0  # tensors of the tokens' size that a step cache keeps of each pass and video
    # Bytes of each model's weights that are in host memory and in no file.
    anonymous: Mapping[str, int] = field(default_factory=dict)
    # Bytes of each model's weights of which running on the host makes copies; default: those in files.
    copied: Mapping[str, int] = field(default_factory=dict)
    # Bytes in files of each model's weights, if they are converted on the way; default: those of the rest.
    stored: Mapping[str, int] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict)

    def bytes_of(self, name: str) -> int:
        """Bytes of a model's weights."""
        return self._once(("bytes", name), lambda: bytes_of(self.models[name]))

    def device_bytes(self, name: str, placement: Placement) -> int:
        """Bytes of a model's weights on the device."""
        return self._once((name, placement), lambda: device_bytes(self.models[name], placement))

    def scratch_bytes(self, name: str, placement: Placement) -> int:
        """Bytes of the host's scratch memory that a model's weights pass through, if it runs there."""
        scratch = self._once(
            ("host", name, placement), lambda: device_bytes(self.models[name], placement, host=True)
        )
        return min(scratch, self.bytes_of(name) - self.held(name))

    def held(self, name: str) -> int:
        """Bytes of a model's weights that are in host memory and in no file."""
        return min(self.anonymous.get(name, 0), self.bytes_of(name))

    def in_files(self, name: str) -> int:
        """Bytes in files of a model's weights, as they are stored there."""
        return self.stored.get(name, self.bytes_of(name) - self.held(name))

    def host_bytes(self, name: str) -> int:
        """Bytes of host memory of a model that runs there unmoved: its weights but those in aligned files."""
        in_files = self.bytes_of(name) - self.held(name)
        return self.held(name) + min(self.copied.get(name, in_files), in_files)

    @property
    def experts(self) -> list[str]:
        """Names of the transformers that are loaded."""
        return [name for name in TRANSFORMERS if name in self.models]

    @property
    def largest_expert(self) -> str:
        """Name of the transformer with the most bytes: one of two may be quantised."""
        return max(self.experts, key=self.bytes_of)

    @property
    def encoders(self) -> list[str]:
        """Names of the models that run before the transformers."""
        return [name for name in ENCODERS if name in self.models]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The latents' "t h w"."""
        vae, (width, height, frames) = self.models["vae"], self.size
        temporal, spatial = strides_of(vae.config)
        return 1 + (frames - 1) // temporal, height // spatial, width // spatial

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height in pixels of one token."""
        _, rows, columns = self.models[self.experts[0]].config.patch_size
        _, stride = strides_of(self.models["vae"].config)
        return columns * stride, rows * stride

    @property
    def tokens(self) -> int:
        """Video tokens l."""
        (width, height, _), (t, _, _) = self.size, self.latent_shape
        return t * (height // self.cell[1]) * (width // self.cell[0])

    def resized(self, size: tuple[int, int, int]) -> "Task":
        """Return the task for another width, height and number of frames."""
        return replace(self, size=size, _known={})

    @property
    def pixels(self) -> int:
        """Bytes of the videos in float32, which the host holds twice at the end."""
        width, height, frames = self.size
        return self.videos * 3 * width * height * frames * 4

    def text(self, names: Iterable[str]) -> int:
        """Activation bytes of these encoders, for the longest prompt or an image."""
        return max((self._once(name, partial(_encode, self.models[name])) for name in names), default=0)

    def denoise(self, chunks: int = 1, in_turn: bool = False) -> int:
        """Activation bytes of a step whose blocks compute the tokens in so many parts.

        `in_turn`: each block computes all passes of all videos, before the next one does.
        """
        latent = self.models["vae"].config.z_dim * torch.Size(self.latent_shape).numel() * 4
        return (
            self.videos * LATENT_COPIES * latent
            + self.cached(in_turn)
            + self._once(("denoise", chunks, in_turn), lambda: self._step(chunks, in_turn))
        )

    def cached(self, in_turn: bool = False) -> int:
        """Bytes that a step cache keeps, and those of the tokens that blocks are given, in float32."""
        if not self.residuals:
            return 0
        model = self.models[self.experts[0]]
        dim = model.config.num_attention_heads * model.config.attention_head_dim
        kept = cached_bytes(self.tokens, dim, self.passes, self.residuals, model.dtype.itemsize)
        # The new residual is there before the one that it replaces is gone.
        return kept + 3 * self.tokens * dim * 4 * (self.passes if in_turn else 1)

    def decode(self, strips: int | None, on_device: bool = False) -> Peak:
        """Activation bytes of decoding; in strips on a device, the layers' histories are on the host."""
        offloaded = on_device and strips is not None
        return self._once(("decode", strips, offloaded), lambda: self._decode(strips, offloaded))

    def encode(self, strips: int | None, on_device: bool = False) -> Peak:
        """Activation bytes of encoding the frames that condition a video, as `decode`."""
        offloaded = on_device and strips is not None
        return self._once(("encode", strips, offloaded), lambda: self._encode(strips, offloaded))

    @property
    def encoded_frames(self) -> int:
        """Frames that the VAE encodes before a video is made: an image, for I2V with frames of zeros."""
        config = self.models[self.experts[0]].config
        if config.in_channels > self.models["vae"].config.z_dim:
            return self.size[2]
        return int(config.in_channels == TI2V_5B.in_channels)

    @property
    def passes(self) -> int:
        """Passes of a step, of all videos."""
        return len(self.step_passes) * self.videos

    def model_runs(self, in_turn: bool = False) -> float:
        """How often a step needs the blocks' weights, in whole models; once for passes that run in turn."""
        layers = self.models[self.experts[0]].config.num_layers
        return sum(
            (1 - len(kind.skip_layers) / layers) * (1 if in_turn else count * self.videos)
            for kind, count in grouped(self.step_passes)
        )

    @property
    def takes_turns(self) -> bool:
        """Whether any passes of a step can run together, block by block."""
        return any(count * self.videos > 1 for _, count in grouped(self.step_passes))

    def step_flops(self) -> float:
        """Floating-point operations of a step."""
        config = self.models[self.experts[0]].config
        return self.videos * sum(forward_flops(config, self.tokens, kind) for kind in self.step_passes)

    def _once(self, key: Any, measure: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _step(self, chunks: int, in_turn: bool) -> int:
        """Measure two and three blocks: every further block keeps as much as the third does.

        Quantised ones, if there are any: a weight that is expanded takes memory, too.
        """
        models = [self.models[name] for name in self.experts]
        model = next(filter(is_quantized, models), models[0])
        quantized = [i for i, block in enumerate(blocks_of(model)) if is_quantized(block)]
        first = max(min(quantized[0], len(blocks_of(model)) - 3), 0) if quantized else 0
        fewer = [meta_copy(model, blocks=n, first=first) for n in (2, 3)]
        for copy in fewer if is_ours(model) else ():
            copy.set_token_chunks(chunks)
            copy.set_samples_in_turn(in_turn)
        two, three = (peak_bytes(self._passes, copy, in_turn) for copy in fewer)
        return two + (len(blocks_of(model)) - 2) * (three - two)

    def _passes(self, model: Any, in_turn: bool) -> list[torch.Tensor]:
        """Run a step's passes, of one video or in turn of all; results live until the last one ends."""
        outputs: list[torch.Tensor] = []
        for kind, count in grouped(self.step_passes):
            for _ in range(1 if in_turn else count):
                outputs += self._run(model, kind, count * self.videos if in_turn else 1)
        return outputs

    def _run(self, model: Any, kind: PassKind, samples: int) -> tuple[torch.Tensor]:
        """Run a transformer; the blocks that are skipped would add nothing to the peak."""
        config = model.config
        dtype = model.condition_embedder.text_embedder.linear_1.bias.dtype
        empty = partial(torch.empty, device="meta", dtype=dtype)
        latents = torch.empty(samples, config.in_channels, *self.latent_shape, device="meta")
        if not is_ours(model):
            latents = latents.to(dtype)
            use_native_attention(model)
        timestep = torch.empty(samples, device="meta")
        image = None
        if config.image_dim is not None:
            image = empty(samples, config.pos_embed_seq_len or 257, config.image_dim)
        text = empty(samples, MAX_TEXT_TOKENS, config.text_dim)
        guidance: dict[str, Any] = {}
        if kind.attention is not None:
            negative = torch.empty_like(text)
            guidance = {"encoder_hidden_states_negative": negative, "attention_guidance": kind.attention}
        return model(
            latents, timestep, text, encoder_hidden_states_image=image, return_dict=False, **guidance
        )

    def _decode(self, strips: int | None, offloaded: bool) -> Peak:
        """Measure three latent frames, of which the first and the second differ from the rest.

        diffusers' autoencoder keeps all frames, in its own dtype, to the end: it is measured whole.
        """
        vae, (t, h, w) = self.models["vae"], self.latent_shape
        frames = min(t, 3) if is_ours(vae) else t
        dtype = next(vae.parameters()).dtype

        def stream(caches: Caches) -> None:
            z = torch.empty(1, vae.config.z_dim, frames, h, w, device="meta", dtype=dtype)
            chunks = vae.decode_stream(z, caches=caches) if is_ours(vae) else vae.decode(z, return_dict=False)
            for chunk in chunks:
                chunk[0].float()

        return self._coding(stream, strips, offloaded)

    def _encode(self, strips: int | None, offloaded: bool) -> Peak:
        """Measure as many frames as three latent ones have; diffusers' autoencoder is measured whole."""
        vae, (width, height, _) = self.models["vae"], self.size
        stride, _ = strides_of(vae.config)
        frames = min(self.encoded_frames, 1 + 2 * stride) if is_ours(vae) else self.encoded_frames
        dtype = next(vae.parameters()).dtype

        def frames_of(count: int) -> torch.Tensor:
            return torch.empty(1, 3, count, height, width, device="meta", dtype=dtype)

        def stream(caches: Caches) -> None:
            if is_ours(vae):
                sizes = [1, *[stride] * (frames // stride)]
                for _ in vae.encode_stream(map(frames_of, sizes), caches=caches):
                    pass
            else:
                vae.encode(frames_of(frames))

        return self._coding(stream, strips, offloaded)

    def _coding(self, stream: Callable[[Caches], None], strips: int | None, offloaded: bool) -> Peak:
        """Measure what encodes or decodes in strips."""
        vae, device = self.models["vae"], TracedDevice()
        if is_ours(vae):
            # The copy may have an earlier plan's strips, or tiles, which only take less.
            vae.disable_tiling()
            vae.disable_strips()
            if strips is not None:
                vae.enable_strips(strips)
        caches = partial(HostHistories, device) if offloaded else TemporalCache
        return Peak(peak_bytes(stream, caches), device.host)


def cached_bytes(tokens: int, dim: int, passes: int, residuals: int = 1, itemsize: int = 2) -> int:
    """Return the bytes that a step cache keeps of so many passes, of all videos, for l video tokens.

    `residuals` of a pass are 1 for MagCache and order + 1 for TaylorCache; they have the dtype of the model's
    large layers. EasyCache keeps latents alone.
    """
    return tokens * dim * passes * residuals * itemsize


def forward_flops(config: Any, tokens: int, kind: PassKind = PLAIN) -> float:
    """Return the floating-point operations of a pass for l video tokens, embeddings aside."""
    d = config.num_attention_heads * config.attention_head_dim
    texts = MAX_TEXT_TOKENS * (1 if kind.attention is None else 2)
    linears = 2 * tokens * (6 * d * d + 2 * d * config.ffn_dim)
    linears += 4 * texts * d * d  # their keys and values
    attention = 4 * tokens * (tokens + texts) * d
    return float((config.num_layers - len(kind.skip_layers)) * (linears + attention))


def _encode(model: Any) -> int:
    """Activation bytes of encoding MAX_TEXT_TOKENS tokens, or an image."""
    config, dtype = model.config, next(model.parameters()).dtype
    empty = partial(torch.empty, device="meta", dtype=dtype)
    if hasattr(config, "num_channels"):
        shape = (1, config.num_channels, config.image_size, config.image_size)
        return peak_bytes(lambda: model(empty(shape), output_hidden_states=True))

    def encode() -> Any:
        ids = torch.empty(1, MAX_TEXT_TOKENS, dtype=torch.long, device="meta")
        # A mask of four axes is used as it is; the values of any other would be read.
        mask = empty(1, 1, MAX_TEXT_TOKENS, MAX_TEXT_TOKENS)
        return model(ids, attention_mask=mask).last_hidden_state

    return peak_bytes(encode)
