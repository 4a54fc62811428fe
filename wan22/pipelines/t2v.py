"""WanT2VPipeline: text becomes a video."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import WanPipeline
from .output import WanVideo
from .plan import make_plan
from .request import Generators, Prompt, Request
from .text import TEXT_ROWS

logger = logging.getLogger(__name__)


class TextCondition:
    """Nothing beside the text: the transformer sees the noisy latents alone."""

    def model_inputs(self, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """Return the transformer's arguments; one timestep serves all tokens, also for TI2V-5B."""
        return {"hidden_states": latents, "timestep": timestep}

    def after_step(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents as they are."""
        return latents


class WanT2VPipeline(WanPipeline):
    """Text to video with Wan 2.2 T2V-A14B, TI2V-5B and Wan 2.1 T2V checkpoints.

    Component and argument names are those of diffusers' WanPipeline; what is not given is the checkpoint's
    official setting. See WanPipeline for the components.
    """

    _hub_class_name = "WanPipeline"

    def check_components(self) -> None:
        """Refuse components that do not belong together, or are not for text to video."""
        super().check_components()
        for model in (self.transformer, self.transformer_2):
            if model is not None and model.config.in_channels != model.config.out_channels:
                channels = f"{model.config.in_channels} channels for {model.config.out_channels} of video"
                raise ValueError(
                    f"the transformer takes {channels}: it is an image-to-video checkpoint, which "
                    "WanT2VPipeline does not run"
                )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = TEXT_ROWS,
        *,
        seed: int | Sequence[int] | None = None,
        flow_shift: float | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        noise_device: str | None = None,
    ) -> WanVideo | tuple[Any]:
        """Make videos of prompts.

        Args:
            prompt: one or several.
            negative_prompt: what to avoid: one, or one per prompt; empty means the checkpoint's default.
            height: pixels, a multiple of 16 (TI2V-5B: 32).
            width: likewise.
            num_frames: 1 + a multiple of 4.
            num_inference_steps: denoising steps, at least 1.
            guidance_scale: of the high-noise expert, and of the other where guidance_scale_2 is not given;
                1 turns guidance off.
            guidance_scale_2: of the low-noise expert.
            num_videos_per_prompt: videos of each prompt, one after the other.
            generator: source of the noise, one or one per video.
            latents: noise to start from, "b c t h w".
            prompt_embeds: instead of prompt, "b s d" with up to 512 rows; `encode_prompt` makes them.
            negative_prompt_embeds: instead of negative_prompt.
            output_type: "np", "pil", "pt" or "latent"; see WanVideo.frames.
            return_dict: False returns a tuple of the frames.
            attention_kwargs: {"scale": s} multiplies the LoRAs attached to the transformers by s.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; may return a
                dict with replacements, and may set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: tensors it gets: latents, prompt_embeds,
                negative_prompt_embeds.
            max_sequence_length: tokens at which a prompt is cut, at most 512.
            seed: instead of generator: of the first video, the next get seed + 1, …; or one per video. None
                draws one, which the recipe tells.
            flow_shift: of the noise schedule.
            sigmas: noise levels instead of num_inference_steps and flow_shift, as they are.
            timesteps: likewise, 0 to 1000.
            noise_device: where the noise is drawn; "cpu", the default, gives the same noise on every machine.

        Returns: the videos and the recipe that made them.

        Raises:
            ValueError: an argument breaks its rule.
            FloatingPointError: latents or frames are not finite.

        Source: Wan2.2 wan/text2video.py, WanT2V.generate.
        """
        plan = make_plan(
            self,
            Request(
                prompt=prompt,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                num_frames=num_frames,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                guidance_scale_2=guidance_scale_2,
                num_videos_per_prompt=num_videos_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                output_type=output_type,
                return_dict=return_dict,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
                seed=seed,
                flow_shift=flow_shift,
                sigmas=sigmas,
                timesteps=timesteps,
                noise_device=noise_device,
            ),
        )
        logger.info("%s", plan.recipe)
        with self.running():
            embeds, negative_embeds = self.encode_plan(plan)
            latents = self.prepare_latents(plan)
            latents = self.denoise(plan, latents, embeds, negative_embeds, TextCondition())
            return self.finish(plan, latents)
