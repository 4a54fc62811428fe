"""WanT2VPipeline: text becomes a video."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..few_steps import FewSteps
from ..presets import MAX_TEXT_TOKENS
from ..video.result import OutputType, WanVideo
from .base import WanPipeline, streamed
from .call.call import Call
from .call.conditions import NoCondition
from .call.guidance.scales import Scale
from .call.noise import starting_noise
from .call.prepare import check
from .call.request import Generators, Prompt, Request, with_known_arguments


class WanT2VPipeline(WanPipeline):
    """Text to video with Wan 2.2 T2V-A14B, TI2V-5B and Wan 2.1 T2V checkpoints.

    Component and argument names are those of diffusers' WanPipeline; what is not given is the checkpoint's
    official setting. See WanPipeline for the components.
    """

    hub_class_name = "WanPipeline"
    checkpoint_kinds = ("WanPipeline", "t2v", "ti2v")

    def check_models(self) -> None:
        """Refuse models that do not belong together, or are not for text to video."""
        super().check_models()
        for model in self.transformers:
            if model.config.in_channels != model.config.out_channels:
                raise ValueError(
                    f"the transformer takes {model.config.in_channels} channels for "
                    f"{model.config.out_channels} of video: it is an image-to-video checkpoint; use "
                    "WanI2VPipeline"
                )

    @with_known_arguments
    def __call__(
        self,
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
        output_type: OutputType = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TEXT_TOKENS,
        *,
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
        """Make videos of prompts.

        Args:
            prompt: one or several.
            negative_prompt: what to avoid: one, or one per prompt; empty means the checkpoint's default.
            height: pixels, a multiple of 16 (TI2V-5B: 32).
            width: pixels, a multiple of 16 (TI2V-5B: 32).
            num_frames: number of frames, 1 + a multiple of 4.
            num_inference_steps: denoising steps, at least 1.
            guidance_scale: scale of the high-noise expert, and of the other unless guidance_scale_2 is given;
                1 turns guidance off. Or a list with the scale of each step, or a function of the noise level,
                1 (pure noise) to 0.
            guidance_scale_2: scale of the low-noise expert.
            num_videos_per_prompt: videos of each prompt, one after the other.
            generator: source of the noise, one or one per video.
            latents: noise to start from, "b c t h w", of the size of the first part of a resolution_schedule.
            prompt_embeds: in place of prompt, "b l d" with up to 512 tokens; `encode_prompt` makes them.
            negative_prompt_embeds: in place of negative_prompt.
            output_type: "np", "pil", "pt" or "latent", see WanVideo.frames; or "stream", see `stream`.
            return_dict: False returns a tuple of the frames.
            attention_kwargs: {"scale": s} multiplies the LoRAs attached to the transformers by s, or each by
                its own: {"scale": {"style": 0.5}}.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; may return a
                dict with replacements, and may set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: names of the tensors it gets: latents, prompt_embeds,
                negative_prompt_embeds.
            max_sequence_length: tokens at which a prompt is cut, at most 512.
            seed: in place of generator: the first video's, the next get seed + 1, …; or one per video. None
                draws one from torch's default generator (torch.manual_seed), which the recipe tells.
            flow_shift: shift of the noise schedule.
            sigmas: noise levels in place of num_inference_steps and flow_shift, 0 to 1, used as they are.
            timesteps: timesteps in place of them, 0 to 1000, used as they are.
            noise_device: device that draws the noise; "cpu", the default, gives the same noise everywhere.
            distilled: settings for LoRAs and checkpoints distilled to a few steps: "lightning-4",
                "lightning-3-phase", "rcm-4", "rcm-4-ode", "turbo", "turbo-ode", "fastwan-3", or FewSteps; the
                trained timesteps and their solver, no guidance unless guidance_scale says so.
            guidance: formula: "cfg-zero*", "apg", "tcfg", "mambo-g", "rescale", "slg", "gated" or "nag"; an
                object of wan22.guidance, for its settings; or a guider of diffusers. Default: plain guidance.
            guidance_interval: shares of the steps between which guidance is on, such as (0.2, 0.9).
            cache: what skips passes: "easy", "mag" or "taylor", with a preset for its error, "easy:low",
                "easy:medium" or "easy:high"; settings such as EasyCache(threshold=0.1); for "mag" also ratios
                of `calibrate_cache`, or their file. Default is None: every pass is computed.
            attention: what self-attention leaves out: "radial" or "sparge", or settings such as
                RadialAttention(decay=0.5). Default is None: nothing.
            fast: "low", "medium" or "high": how much faster, by the step cache with the least known error
                for the checkpoint; the log and the recipe say which.
            resolution_schedule: fewer tokens for a while: pairs (scale, until) of parts of the schedule, such
                as [(0.75, 0.5)]: half of the steps run at 0.75 of both sides, the rest at full size. Or
                "coarse-to-fine", which is this, or "u", which has smaller sides in the middle.
            preview: what shows the video while it is made, from the latents as they will be: True, in place
                in a notebook, otherwise preview.png; a path that ends in .png, .gif or .webp and is written
                anew each time; or a function that gets a `Preview`.
            preview_every: steps between previews; default gives about ten of them.
            preview_decoder: for finer previews, a tiny autoencoder's file (taew2_1, taew2_2) or TinyDecoder.

        Returns: the videos and the recipe that made them; output_type="stream" gives a WanStream instead, and
            return_dict=False a tuple of the frames.

        Raises:
            ValueError: an argument breaks its rule.
            FloatingPointError: latents or frames are not finite.

        Source: Wan2.2 wan/text2video.py, WanT2V.generate.
        """
        return self.run(Request(locals()))

    stream = streamed(__call__)

    def make_condition(self, call: Call) -> NoCondition:
        """Return that there is nothing beside the text."""
        return NoCondition()

    # ---- for loops of the caller's own, written for diffusers ----

    def check_inputs(
        self,
        prompt: Prompt,
        negative_prompt: Prompt,
        height: int,
        width: int,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        guidance_scale_2: float | None = None,
    ) -> None:
        """Check arguments of the call as the call does: a ValueError names the value and the rule."""
        check(self, Request.of(self.__call__, locals()))

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return noise as the call draws it, "b c t h w" of a size in pixels, or the given latents.

        Raises:
            ValueError: a size does not fit, or generators and videos differ in number.
        """
        if latents is not None:
            return latents.to(device, dtype)
        shape = num_channels_latents, *self.checked_latent_shape(num_frames, height, width)[1:]
        return starting_noise(batch_size, shape, generator, self.draw_seed, device, dtype)
