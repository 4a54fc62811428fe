"""WanI2VPipeline: an image, or a first and a last one, become a video."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device

from ..checkpoints.loading.alignment import align_weights
from ..checks import check_choice, check_positive_int
from ..few_steps import FewSteps
from ..presets import MAX_TEXT_TOKENS
from ..video.result import OutputType, WanVideo
from .attached.calls import in_turn
from .base import WanPipeline, streamed
from .call import autoencoders
from .call.call import Call
from .call.conditions import ChannelCondition, Condition, FirstFrameCondition, NoCondition
from .call.guidance.scales import Scale
from .call.images import (
    FITS,
    Fit,
    Picture,
    bicubic,
    check_aspect,
    closest_size,
    fit_picture,
    floor_size,
    lanczos,
    load_pictures,
    one_per_video,
    smallest_area,
)
from .call.noise import starting_noise
from .call.prepare import check
from .call.request import Generators, Prompt, Request, with_known_arguments


class WanI2VPipeline(WanPipeline):
    """Image to video with Wan 2.2 I2V-A14B, TI2V-5B, and Wan 2.1 I2V and FLF checkpoints.

    Component and argument names are those of diffusers' WanImageToVideoPipeline; what is not given is the
    checkpoint's official setting. See WanPipeline for the components not listed here.

    Args:
        image_encoder: CLIPVisionModel of Wan 2.1 checkpoints; None if image_embeds are given at every call.
        image_processor: its CLIPImageProcessor.
    """

    hub_class_name = "WanImageToVideoPipeline"
    checkpoint_kinds = ("WanImageToVideoPipeline", "i2v", "flf2v", "ti2v")
    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->transformer_2->vae"
    _optional_components = [*WanPipeline._optional_components, "image_encoder", "image_processor"]

    image_encoder: Any
    image_processor: Any

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        image_processor: Any = None,
        image_encoder: Any = None,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            scheduler,
            transformer,
            transformer_2,
            boundary_ratio,
            expand_timesteps,
        )
        self.register_modules(image_processor=image_processor, image_encoder=image_encoder)

    def check_components(self) -> None:
        """Refuse components that do not belong together, or are not for image to video."""
        super().check_components()
        z_dim = self.latent_channels
        expected = z_dim if self.config.expand_timesteps else 2 * z_dim + self.vae_scale_factor_temporal
        for model in self.transformers:
            taken = model.config.in_channels
            if taken == z_dim != expected:
                raise ValueError(
                    f"the transformer takes {taken} channels, as many as the VAE has: it is a text-to-video "
                    "checkpoint; use WanT2VPipeline"
                )
            if taken != expected:
                raise ValueError(f"the transformer takes {taken} channels; image to video needs {expected}")

    @with_known_arguments
    def __call__(
        self,
        image: Any = None,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Scale | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        last_image: Any = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TEXT_TOKENS,
        *,
        max_area: int | None = None,
        fit: Fit | None = None,
        seed: int | Sequence[int] | None = None,
        flow_shift: float | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        noise_device: str | None = None,
        distilled: str | FewSteps | Mapping[str, Any] | None = None,
        guidance: Any = None,
        guidance_interval: Sequence[float] | None = None,
        cache: Any = None,
        attention: Any = None,
        fast: str | None = None,
        resolution_schedule: Any = None,
        preview: Any = None,
        preview_every: int | None = None,
        preview_decoder: Any = None,
    ) -> WanVideo:
        """Make videos that start from images.

        Arguments not listed here are those of `WanT2VPipeline.__call__`.

        Args:
            image: the first frame: one for all prompts, or a list with one per prompt. A PIL image of any
                mode, a path, a URL, an array or a tensor, see `images.load_pictures`. TI2V-5B makes a video
                of the prompt alone without it.
            prompt: what happens: one or several; one serves any number of images.
            height: pixels, a multiple of 16 (TI2V-5B: 32); needs width. Without both, the image's aspect and
                max_area decide.
            width: pixels, likewise a multiple of 16 or 32; needs height.
            image_embeds: in place of the image encoder's tokens (Wan 2.1): "l d", or "b l d" per video; for
                first and last frame one's tokens after the other's, "2 l d" or "2b l d".
            last_image: the last frame, like image; for I2V-A14B and FLF checkpoints.
            max_area: pixels that height times width may have; the checkpoint's by default.
            fit: how an image of another aspect becomes height x width: "crop" covers it, "pad" fits inside on
                black, "stretch" scales each axis by itself. By default it is cropped; where the size follows
                the image, I2V-A14B's is stretched by what whole cells leave over, as in the official code.

        Returns: the videos and the recipe that made them; `recipe.width` and `recipe.height` tell the size.

        Raises:
            FileNotFoundError: an image's file is not there.
            ValueError: an argument breaks its rule.
            FloatingPointError: latents or frames are not finite.

        Source: Wan2.2 wan/image2video.py, WanI2V.generate; wan/textimage2video.py, WanTI2V.i2v.
        """
        return self.run(Request(locals()))

    stream = streamed(__call__)

    # ---- checks and sizes ----

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height in pixels of one token."""
        _, rows, columns = self.any_transformer.config.patch_size
        return columns * self.vae_scale_factor_spatial, rows * self.vae_scale_factor_spatial

    def best_size(self, picture: Picture, max_area: int) -> tuple[int, int]:
        """Return the width and height that suit an image, by the checkpoint's official rule."""
        rule = closest_size if self.config.expand_timesteps else floor_size
        return rule(picture.size, max_area, self.cell)

    def prompt_count(self, request: Request) -> int | None:
        """Return the number of prompts that there must be: that of the images, if there are several."""
        images = max(len(request.image), len(request.last_image))
        return images if images > 1 else None

    def default_size(self, request: Request) -> tuple[int, int]:
        """Return the height and width that follow from the images; a ValueError names different ones."""
        if not request.image:
            return super().default_size(request)
        area = self._area(request)
        sizes: dict[tuple[int, int], None] = {}  # a set in order
        for picture in request.image:
            check_aspect("image", picture)
            least = smallest_area(partial(self.best_size, picture))
            check_positive_int("max_area", area, least=least)
            sizes[self.best_size(picture, area)] = None
        if len(sizes) > 1:
            found = ", ".join(f"{w}x{h}" for w, h in sizes)
            raise ValueError(
                f"the images give different sizes, {found}; give height and width, or one call each"
            )
        width, height = next(iter(sizes))
        return height, width

    def followed_area(self, request: Request) -> int | None:
        """Return the pixels that height times width may have, where the size follows the images."""
        return self._area(request) if request.image and request.height is None else None

    def _area(self, request: Request) -> int:
        """Return the pixels that height times width may have."""
        return self.preset.height * self.preset.width if request.max_area is None else request.max_area

    def with_inputs(self, request: Request) -> Request:
        """Return a request whose images are loaded and checked, before any work and any wait."""
        self.check_components()
        images = {name: load_pictures(name, getattr(request, name)) for name in ("image", "last_image")}
        request = request.changed(**images)
        self._check_images(request)
        if request.image:
            self.check_vae("image")
        return request

    def _check_images(self, request: Request) -> None:
        """Refuse images that the checkpoint does not take, or that contradict each other."""
        config = self.any_transformer.config
        if request.fit is not None:
            check_choice("fit", request.fit, FITS)
        if (request.height is None) != (request.width is None):
            raise ValueError("give height and width, or neither: then the image's aspect decides")
        if request.max_area is not None and request.height is not None:
            raise ValueError("max_area and height and width are given; give one or the other")
        first, last = len(request.image), len(request.last_image)
        if not first and (last or not self.config.expand_timesteps):
            raise ValueError("image is None; give the first frame (only TI2V-5B makes videos without)")
        if not first and (request.max_area is not None or request.fit is not None):
            raise ValueError("max_area and fit are about images, and image is None; give height and width")
        if first > 1 < last != first:
            raise ValueError(f"{last} last images for {first} images; give {first}, or one")
        if last and self.config.expand_timesteps:
            raise ValueError("TI2V-5B was not trained for last_image; use an I2V-A14B or FLF checkpoint")
        if config.image_dim is None:
            if request.image_embeds is not None:
                raise ValueError(
                    "image_embeds are given, but this checkpoint takes none; only Wan 2.1's I2V does"
                )
            return
        if last and config.pos_embed_seq_len is None:
            raise ValueError("Wan 2.1 I2V takes no last_image; use its FLF checkpoint, or I2V-A14B")
        if not last and config.pos_embed_seq_len is not None:
            raise ValueError("last_image is None; this FLF checkpoint needs a first and a last frame")
        if request.image_embeds is None:
            for name in ("image_encoder", "image_processor"):
                if getattr(self, name) is None:
                    raise ValueError(f"pipe.{name} is None; load it, or give image_embeds")
            self.check_width("image_encoder", "image_dim")

    # ---- conditioning ----

    def make_condition(self, call: Call) -> Condition:
        """Encode the images of a call's videos, each image once."""
        request = call.request
        if not request.image:
            return NoCondition()
        count = len(call.generators)
        pairs = list(
            zip(
                one_per_video(request.image, count),
                one_per_video(request.last_image, count) if request.last_image else [None] * count,
                strict=True,
            )
        )
        embeds = self._image_embeds(request, pairs)
        encoded: dict[tuple[int, int], torch.Tensor] = {}
        for first, last in pairs:
            key = id(first), id(last)
            if key not in encoded:
                frames = [self.fitted(picture, call) for picture in (first, last) if picture is not None]
                encoded[key] = self.encode_frames(frames, call.recipe.num_frames)
        latents = [encoded[id(first), id(last)] for first, last in pairs]
        if self.config.expand_timesteps:
            return FirstFrameCondition(torch.cat(latents))
        return ChannelCondition(latents, embeds)

    def fitted(self, picture: Picture, call: Call) -> torch.Tensor:
        """Return an image at a call's size, "1 3 1 h w" in [-1, 1]."""
        request = call.request
        size, tokens = call.full_size, self.config.expand_timesteps
        # Where an image has its own best size, less than a cell of stretching brings it there.
        follows = request.height is None and self.best_size(picture, self._area(request)) == size
        fit: Fit = request.fit or ("stretch" if follows and not tokens else "crop")
        resize = lanczos if tokens else bicubic
        fitted = fit_picture(picture, size, fit, resize)
        # In a part of the schedule at another size, the image shows the same.
        return resize(fitted, call.part or size).pixels[None, :, None]

    def encode_frames(self, images: Sequence[torch.Tensor], num_frames: int) -> torch.Tensor:
        """Encode a first and perhaps a last frame "1 3 1 h w" as the transformer takes them, "1 c t h w"."""
        if self.config.expand_timesteps:
            return self.encode_clip(images[:1])
        between = num_frames - len(images)
        if between < 0:
            raise ValueError("num_frames=1 has no room for last_image; give 5 or more")
        # In pieces, so that a long clip of zeros never lies in memory whole; made where they are encoded.
        stride = self.vae_scale_factor_temporal
        place = get_module_execution_device(self.vae)
        zeros = torch.zeros_like(images[0], device=place, dtype=self.vae.dtype)
        pieces = [zeros.expand(-1, -1, min(stride, between - i), -1, -1) for i in range(0, between, stride)]
        latents = self.encode_clip([images[0], *pieces, *images[1:]])
        mask = latents.new_zeros(1, stride, *latents.shape[2:])
        mask[:, :, 0] = 1
        if len(images) > 1:
            mask[:, -1, -1] = 1
        return torch.cat((mask, latents), dim=1)

    @in_turn
    def encode_clip(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Encode a clip given in pieces "1 3 t h w" into normalised latents "1 c t h w", float32."""
        return autoencoders.encode(self.vae, pieces).to(self._execution_device)

    def _image_embeds(
        self, request: Request, pairs: Sequence[tuple[Picture, Picture | None]]
    ) -> list[torch.Tensor] | None:
        """Return each video's tokens of the image encoder; None for checkpoints without."""
        model = self.any_transformer
        if model.config.image_dim is None:
            return None
        per_video = 1 if pairs[0][1] is None else 2
        embeds = request.image_embeds
        if embeds is None:
            known: dict[int, torch.Tensor] = {}
            for picture in (p for pair in pairs for p in pair if p is not None):
                if id(picture) not in known:
                    known[id(picture)] = self.encode_image(picture.to_pil())
            embeds = torch.cat([known[id(p)] for pair in pairs for p in pair if p is not None])
        else:
            embeds = embeds[None] if embeds.ndim == 2 else embeds
            if len(embeds) == per_video:
                embeds = embeds.repeat(len(pairs), 1, 1)
        d = model.config.image_dim
        if embeds.ndim != 3 or embeds.shape[2] != d or len(embeds) != per_video * len(pairs):
            raise ValueError(
                f"image_embeds have shape {tuple(embeds.shape)}; for {len(pairs)} videos it must be "
                f"({per_video * len(pairs)}, l, {d}), or ({per_video}, l, {d}) for all alike"
            )
        return list(embeds.to(self._execution_device, model.dtype).split(per_video))

    @in_turn
    @torch.no_grad()
    def encode_image(self, image: Any, device: torch.device | None = None) -> torch.Tensor:
        """Return the image encoder's tokens of one PIL image or a list, "b l d" (Wan 2.1)."""
        align_weights(self.image_encoder)
        inputs = self.image_processor(images=image, return_tensors="pt")
        inputs = inputs.to(get_module_execution_device(self.image_encoder), self.image_encoder.dtype)
        # The layer before the last is what Wan was trained with.
        embeds = self.image_encoder(**inputs, output_hidden_states=True).hidden_states[-2]
        return embeds.to(device or self._execution_device)

    # ---- for loops of the caller's own, written for diffusers ----

    def check_inputs(
        self,
        prompt: Prompt,
        negative_prompt: Prompt,
        image: Any,
        height: int,
        width: int,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        guidance_scale_2: float | None = None,
    ) -> None:
        """Check arguments of the call as the call does: a ValueError names the value and the rule."""
        request = Request.of(self.__call__, locals())
        if self.any_transformer.config.pos_embed_seq_len is not None:
            request = request.changed(last_image=image)  # which those loops do not hand over here
        check(self, self.with_inputs(request))

    def prepare_latents(
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return noise, or the given latents, and what the transformer gets of the images.

        Args:
            image: "b 3 h w" in [-1, 1], of the height and width that are given; one, or one per video.
            last_image: likewise; not for TI2V-5B.

        Returns: latents "b c t h w" and mask and images' latents, "b 4+c t h w", to be put behind them in
            channels; for TI2V-5B latents, the first frame's latents "b c 1 h w", and a mask "1 1 t h w" that
            is 0 where those stand.

        Raises:
            ValueError: a size does not fit, or images, generators and videos differ in number.
        """
        self.check_vae("image")
        _, *sizes = self.checked_latent_shape(num_frames, height, width)
        given = [image] if last_image is None or self.config.expand_timesteps else [image, last_image]
        for name, frames in zip(("image", "last_image"), given, strict=False):
            if tuple(frames.shape[1:]) != (3, height, width) or len(frames) not in (1, batch_size):
                rule = f"it must be (1, 3, {height}, {width}), or one image for each of {batch_size} videos"
                raise ValueError(f"{name} has shape {tuple(frames.shape)}; {rule}")
        if latents is None:
            shape = num_channels_latents, *sizes
            latents = starting_noise(batch_size, shape, generator, self.draw_seed, device, dtype)
        count = max(map(len, given))
        videos = zip(*(f[:, :, None].expand(count, -1, -1, -1, -1).split(1) for f in given), strict=True)
        encoded = [self.encode_frames(frames, num_frames) for frames in videos]
        condition = torch.cat(encoded).expand(batch_size, -1, -1, -1, -1).to(device, dtype)
        latents = latents.to(device, dtype)
        if not self.config.expand_timesteps:
            return latents, condition
        mask = torch.ones(1, 1, *sizes, device=device, dtype=dtype)
        mask[:, :, 0] = 0
        return latents, condition, mask
