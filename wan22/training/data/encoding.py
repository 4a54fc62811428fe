"""Frames and captions become what is trained on: by a pipeline, or by a checkpoint's models one at a time.

Shapes: c latent channels, t h w latent frames, rows, columns, l image tokens, s text tokens, d their width;
frames are "3 h w" in pixels.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...checks import cut
from ...pipelines.call import autoencoders
from ...pipelines.call.images import Picture, Size, fit_picture, load_picture
from ...pipelines.i2v import WanI2VPipeline
from ...pipelines.loading.checkpoint import TRANSFORMERS, Wanted
from ...pipelines.loading.load import locate, outlined_pipeline
from ...pipelines.t2v import WanT2VPipeline
from ...private_apis import uncompiled
from ...video.reading import read_frames
from .buckets import Rules
from .cached import CONDITIONED
from .items import Item

_SAMPLES = 256  # values of each tensor that make a model's mark
_ENCODING = ("encoder.", "quant_conv.")  # what of a VAE decides about latents


# ---- the models ----


@dataclass(frozen=True)
class Encoders:
    """The models that encode a data set, of a pipeline or of a checkpoint.

    Args:
        outline: a pipeline of the checkpoint; its models may be on the meta device.
        source: the checkpoint's folder or repository; None: `outline` is the pipeline that encodes.
        device: where the models of a checkpoint run.
        dtype: dtype of its text encoder and image encoder; None: as stored.
        hub: options of the download.
    """

    outline: Any
    source: str | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a value that nothing changes)
    dtype: torch.dtype | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Any,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        hub: Mapping[str, Any] | None = None,
    ) -> "Encoders":
        """Return those of a pipeline, or of a checkpoint's folder or repository, whose weights are not read.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is no checkpoint that can be trained, or the pipeline lacks a model.
        """
        if not isinstance(source, str | Path):
            if source.vae is None or source.text_encoder is None or source.tokenizer is None:
                raise ValueError("a data set is encoded by vae, text_encoder and tokenizer; load all three")
            if source.vae.dtype != torch.float32:
                raise ValueError(f"pipe.vae is in {source.vae.dtype}; latents are encoded in torch.float32")
            return cls(source)
        checkpoint = locate(str(source), hub or {})
        wanted = Wanted(dtype={"vae": torch.float32, "default": dtype})
        models = checkpoint.outline(wanted)
        kind = _pipeline_for(checkpoint.kind, models)
        if kind is None:
            raise ValueError(f"{cut(source)} is a checkpoint for {checkpoint.kind}; t2v and i2v are trained")
        outline = outlined_pipeline(kind, models, wanted)
        if outline is None:
            raise ValueError(f"{cut(source)} does not say what its transformer and VAE are like")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(outline, str(source), torch.device(device), dtype, hub or {})

    @property
    def rules(self) -> Rules:
        """What the checkpoint's clips are like."""
        return Rules.of(self.outline)

    @contextmanager
    def images(self) -> Iterator[Any]:
        """Give a pipeline with VAE and, for Wan 2.1 I2V, image encoder; a loaded one is freed at the end."""
        with self._loaded(text_encoder=None, tokenizer=None) as pipe:
            yield pipe

    @contextmanager
    def texts(self) -> Iterator[Any]:
        """Give a pipeline with text encoder and tokenizer; a loaded one is freed at the end."""
        with self._loaded(vae=None, **self._without_image_encoder) as pipe:
            yield pipe

    @property
    def _without_image_encoder(self) -> dict[str, None]:
        continued = isinstance(self.outline, WanI2VPipeline)
        return dict.fromkeys(("image_encoder", "image_processor")) if continued else {}

    @contextmanager
    def _loaded(self, **absent: None) -> Iterator[Any]:
        if self.source is None:
            yield self.outline
            return
        dtype = {"vae": torch.float32, "default": self.dtype}
        options = {**dict.fromkeys(TRANSFORMERS), **absent, **self.hub}
        pipe: Any = type(self.outline).from_pretrained(self.source, dtype=dtype, **options)
        try:
            yield pipe.to(self.device)
        finally:
            pipe.free()


def _pipeline_for(kind: str | None, models: Mapping[str, Any]) -> Any:
    """Return the pipeline that runs a checkpoint, by its kind, or by its models if nothing names the kind."""
    if kind is not None:
        known = (WanT2VPipeline, WanI2VPipeline)
        return next((cls for cls in known if kind in (cls.__name__, *cls.checkpoint_kinds)), None)
    config = getattr(models.get("transformer"), "config", None)
    continued = config is not None and config.in_channels > config.out_channels
    return WanI2VPipeline if continued else WanT2VPipeline


def mark_of(model: Any) -> str:
    """Return a hash of values all over a model's tensors, the same for one checkpoint in any layout.

    Of a VAE what decodes does not matter, and how latents are normalised does.
    """
    model, digest = uncompiled(model), hashlib.sha256()
    state = model.state_dict()
    if any(name.startswith(_ENCODING[0]) for name in state) and hasattr(model.config, "latents_mean"):
        state = {name: tensor for name, tensor in state.items() if name.startswith(_ENCODING)}
        digest.update(f"{list(model.config.latents_mean)} {list(model.config.latents_std)}".encode())
    for name, tensor in sorted(state.items()):
        if tensor.is_meta:
            raise ValueError(f"{type(model).__name__} has no weights in memory; load it without offloading")
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{dtype}:{digest.hexdigest()[:32]}"


# ---- frames ----


def antialiased(picture: Picture, size: Size) -> Picture:
    """Resize by bicubic interpolation with antialias, values clamped to [-1, 1]."""
    if picture.size == size:
        return picture
    w, h = size
    pixels = F.interpolate(picture.pixels[None], (h, w), mode="bicubic", antialias=True)[0]
    return Picture(pixels.clamp_(-1, 1), picture.name)


def fitted(frame: Any, size: Size) -> torch.Tensor:
    """Return a frame "h w 3" in uint8, or a picture's path, cropped to a size: "3 h w" in [-1, 1]."""
    name = "frame" if isinstance(frame, np.ndarray) else "image"
    return fit_picture(load_picture(name, frame), size, "crop", antialiased).pixels


def clips_of_file(items: Mapping[int, Item]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield clips of one file, of one size, by their keys, with their frames; the file is decoded once.

    No more frames are held than those of one clip, and what it shares with later ones.
    """
    first = next(iter(items.values()))
    _, height, width = first.bucket
    if first.video is None:
        picture = fitted(first.file, (width, height))
        yield from ((key, [picture]) for key in items)
        return
    needed = sorted({number for item in items.values() for number in item.numbers})
    arriving = zip(needed, read_frames(first.video, needed), strict=True)
    held: dict[int, torch.Tensor] = {}
    for key, item in sorted(items.items(), key=lambda pair: pair[1].numbers[0]):
        held = {number: frame for number, frame in held.items() if number >= item.numbers[0]}
        while item.numbers[-1] not in held:
            number, frame = next(arriving)
            held[number] = fitted(frame, (width, height))
        yield key, [held[number] for number in item.numbers]


# ---- encoding ----


@torch.no_grad()
def encode_clip(pipe: Any, kind: str, frames: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encode a clip's frames "3 h w".

    Returns: "latents", "c t h w" float32; for I2V "condition", "4+c t h w" float32; for Wan 2.1 I2V
        "image_embeds", "l d".
    Raises: FloatingPointError: latents are not finite.
    """
    pieces = [frame[None, :, None] for frame in frames]
    found = {"latents": autoencoders.encode(pipe.vae, pieces)[0]}
    if kind in CONDITIONED:
        ends = [0, -1] if kind == "flf2v" else [0]
        found["condition"] = pipe.encode_frames([pieces[i] for i in ends], len(frames))[0]
        if pipe.image_encoder is not None:
            embeds = [pipe.encode_image(Picture(frames[i]).to_pil())[0] for i in ends]
            found["image_embeds"] = torch.cat(embeds)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def encode_caption(pipe: Any, caption: str) -> torch.Tensor:
    """Encode a caption, without the zeros after it: "s d", in the text encoder's dtype."""
    embeds = pipe.encode_prompt(caption, do_classifier_free_guidance=False, device=torch.device("cpu"))[0][0]
    used = embeds.ne(0).any(dim=1).nonzero()
    return embeds[: int(used.max()) + 1].contiguous()
