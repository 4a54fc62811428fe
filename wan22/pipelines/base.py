"""What every Wan pipeline shares: components, defaults, the course of a call, noise, the sampling loop.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, s text rows, d their width.
"""

import logging
import secrets
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..checkpoints.loading.alignment import align_weights
from ..checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
from ..presets import MAX_TEXT_TOKENS, Preset, closest_preset, find_preset
from ..video.result import WanStream, WanVideo
from . import checks
from .compatibility import CompatiblePipeline
from .conditions import Condition
from .decoding import DecodingPipeline
from .experts import Expert
from .loading.hub_classes import from_diffusers_model
from .lora import LoraPipeline
from .plan import make_plan
from .preview import Previewer
from .request import Plan, Prompt, Request
from .text import encode_prompt, pad_rows
from .velocity import Embeds, Pass, Velocity, one_by_one

logger = logging.getLogger(__name__)


class WanPipeline(CompatiblePipeline, DecodingPipeline, LoraPipeline):
    """Base of WanT2VPipeline and WanI2VPipeline.

    Args:
        tokenizer: of umT5.
        text_encoder: UMT5EncoderModel; None if prompt_embeds are given at every call.
        vae: AutoencoderKLWan, ours or diffusers'.
        scheduler: one of `wan22.schedulers`, or any flow-matching scheduler of diffusers.
        transformer: the high-noise expert, or the only transformer.
        transformer_2: the low-noise expert. A slot that the schedule never reaches may be None.
        boundary_ratio: `transformer` serves timesteps at or above this share of 1000; None for one
            transformer.
        expand_timesteps: whether the checkpoint takes one timestep per token (TI2V-5B).

    Raises:
        ValueError: the components do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"
    _optional_components = ["tokenizer", "text_encoder", "transformer", "transformer_2"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    vae: AutoencoderKLWan
    scheduler: Any
    tokenizer: Any
    text_encoder: Any
    transformer: WanTransformer3DModel | None
    transformer_2: WanTransformer3DModel | None

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
        )
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)
        self._stop = False
        self.check_components()

    def __setattr__(self, name: str, value: Any) -> None:
        ours = name in ("vae", "transformer", "transformer_2")
        super().__setattr__(name, from_diffusers_model(value) if ours else value)

    # ---- what the components are ----

    @property
    def transformers(self) -> list[WanTransformer3DModel]:  # type: ignore[override]
        """The loaded transformers, high noise first."""
        return [model for model in (self.transformer, self.transformer_2) if model is not None]

    @property
    def any_transformer(self) -> WanTransformer3DModel:
        """A loaded transformer; both slots have the same configuration."""
        if not self.transformers:
            raise ValueError("neither transformer nor transformer_2 is loaded; a video needs at least one")
        return self.transformers[0]

    @property
    def released(self) -> Preset | None:
        """The released checkpoint that the loaded configs belong to; None if that cannot be told."""
        if not self.transformers:
            return None
        config = self.any_transformer.config
        return find_preset(
            dim=config.num_attention_heads * config.attention_head_dim,
            in_channels=config.in_channels,
            experts=self._experts,
            two_frames=config.pos_embed_seq_len is not None,
        )

    @property
    def _experts(self) -> int:
        return 1 if self.config.boundary_ratio is None else 2

    @property
    def preset(self) -> Preset:
        """Facts and recipe of the loaded checkpoint; for an unknown one, of its closest relative."""
        models = self.transformers
        in_channels = models[0].config.in_channels if models else self.vae.config.z_dim
        return self.released or closest_preset(in_channels=in_channels, experts=self._experts)

    @property
    def checkpoint_name(self) -> str:
        """The released checkpoint's name, or where an unknown one came from."""
        released = self.released
        return released.name if released else str(self.config.get("_name_or_path") or "unnamed checkpoint")

    def check_components(self) -> None:
        """Refuse components that do not belong together."""
        if self.config.boundary_ratio is None and self.transformer_2 is not None:
            raise ValueError(
                "transformer_2 is given but boundary_ratio is None; give the boundary, 0.875 for T2V-A14B"
            )
        if not isinstance(self.vae, AutoencoderKLWan):
            raise ValueError(f"vae must be an AutoencoderKLWan, not {type(self.vae).__name__}")
        for model in self.transformers:
            if model.config.out_channels != self.vae.config.z_dim:
                raise ValueError(
                    f"the transformer predicts {model.config.out_channels} latent channels, the VAE has "
                    f"{self.vae.config.z_dim}; they are of different checkpoints"
                )

    # ---- a call, and its steps ----

    def default_size(self, request: Request) -> tuple[int, int]:
        """Return the height and width of a call that gives none."""
        return self.preset.height, self.preset.width

    def followed_area(self, request: Request) -> int | None:
        """Return the pixels that height times width may have, where the size follows images."""
        return None

    @abstractmethod
    def make_condition(self, plan: Plan) -> Condition:
        """Return what the transformer gets beside text."""

    @torch.no_grad()
    def run(self, request: Request) -> WanVideo | WanStream | tuple[Any]:
        """Carry out a call: check it, encode, prepare, denoise, decode."""
        plan = make_plan(self, request)
        self._recipe, self._guided = plan.recipe, plan.guided
        self._interrupt = self._stop = False
        previewer = self.make_previewer(plan)
        logger.info("%s", plan.recipe)
        videos = len(plan.generators)
        self.make_room(plan.recipe.height, plan.recipe.width, plan.recipe.num_frames, videos)
        with self.running():
            embeds, negative_embeds = self.encode_plan(plan)
            condition = self.make_condition(plan)
            latents = self.prepare_latents(plan)
            latents = self.denoise(plan, latents, embeds, negative_embeds, condition, previewer)
            return self.finish(plan, latents)

    def stream(self, *args: Any, **kwargs: Any) -> WanStream:
        """Make one video whose frames are decoded as they are asked for, so that a long one needs no room.

        Args:
            *args: those of the call.
            **kwargs: likewise, without output_type.

        Returns: the frames, to go through or to save; sampling is done, decoding starts with the first.

        Raises:
            ValueError: several videos are asked for, or an argument breaks its rule.
        """
        return self(*args, **kwargs, output_type="stream")

    def stop(self) -> None:
        """Let a running call end with its current step: it returns the video as it would become.

        For another thread, or a signal's handler; the recipe tells after how many steps.
        """
        self._stop = True

    def is_asked_to_end(self) -> tuple[bool, bool]:
        """Whether the running call is to end with this step: by `stop`, and by a callback's `_interrupt`."""
        return self._stop, self._interrupt

    def run_passes(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """Run the passes of a step, with and without the prompt, and return what each predicts."""
        return one_by_one(passes)

    def draw_seed(self) -> int:
        """Draw the seed of a call that gives none."""
        return secrets.randbelow(2**32)

    def encode_prompt(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = MAX_TEXT_TOKENS,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts; the result can be kept and given to any number of calls.

        Args:
            prompt: one or several.
            negative_prompt: one, or one per prompt; empty means the checkpoint's default.
            do_classifier_free_guidance: whether the negative prompt is needed.
            num_videos_per_prompt: how often each row is repeated.
            prompt_embeds: instead of prompt, "b s d" with s up to 512.
            negative_prompt_embeds: instead of negative_prompt.
            max_sequence_length: tokens at which a prompt is cut; the result has 512 rows whatever it is.
            device: of the result; default is where the transformer runs.
            dtype: of the result; default is the text encoder's.

        Returns: embeddings of prompt and negative prompt, each "b 512 d"; None for the latter without
            guidance.
        """
        device = device or self._execution_device
        align_weights(self.text_encoder)
        known: dict[str, torch.Tensor] = {}

        def rows(texts: list[str]) -> torch.Tensor:
            for text in texts:
                if text not in known:
                    known[text] = encode_prompt(self.tokenizer, self.text_encoder, text, max_sequence_length)
            return torch.cat([known[text] for text in texts])

        def finish(embeds: torch.Tensor) -> torch.Tensor:
            return pad_rows(embeds).repeat_interleave(num_videos_per_prompt, 0).to(device, dtype)

        with torch.no_grad():
            if prompt_embeds is None:
                prompt_embeds = rows(checks.as_prompts("prompt", prompt))
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                negative_prompt = "" if negative_prompt is None else negative_prompt
                negatives = checks.as_prompts("negative_prompt", negative_prompt, len(prompt_embeds))
                negative_prompt_embeds = rows([text or self.preset.negative_prompt for text in negatives])
            negative = finish(negative_prompt_embeds) if negative_prompt_embeds is not None else None
            return finish(prompt_embeds), negative if do_classifier_free_guidance else None

    def encode_plan(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode a plan's prompts and negative prompts: "b 512 d", one entry per video."""
        request, repeat = plan.request, plan.request.num_videos_per_prompt
        prompts = [text or "" for text in plan.recipe.prompts[::repeat]]
        negatives = [text or "" for text in plan.recipe.negative_prompts[::repeat]]
        return self.encode_prompt(
            prompts if request.prompt_embeds is None else None,
            negatives if request.negative_prompt_embeds is None else None,
            plan.guided,
            repeat,
            request.prompt_embeds,
            request.negative_prompt_embeds,
            request.max_sequence_length,
        )

    def prepare_latents(self, plan: Plan) -> torch.Tensor:
        """Draw each video's noise from its own generator, or take the given latents; "b c t h w", float32."""
        device, given = self._execution_device, plan.request.latents
        if given is not None:
            return given.to(device, torch.float32)
        recipe = plan.recipe
        shape = self.latent_shape(recipe.num_frames, recipe.height, recipe.width)
        draws = [
            torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in plan.generators
        ]
        return torch.stack([draw.to(device) for draw in draws])

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return one video's latent shape "c t h w"."""
        stride = self.vae.spatial_stride
        frames = 1 + (num_frames - 1) // self.vae.temporal_stride
        return self.vae.config.z_dim, frames, height // stride, width // stride

    def denoise(
        self,
        plan: Plan,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        condition: Condition,
        previewer: Previewer | None = None,
    ) -> torch.Tensor:
        """Run the sampling loop.

        Args:
            plan: scheduler with its timesteps set, experts, callback.
            latents: "b c t h w", float32.
            prompt_embeds: "b 512 d".
            negative_prompt_embeds: "b 512 d", or None if no step is guided.
            condition: what the transformer gets beside latents and text.
            previewer: what shows the video while it is made.

        Returns: "b c t h w", float32.

        Raises:
            FloatingPointError: the latents are no longer finite.
        """
        scheduler, times = plan.scheduler, plan.scheduler.timesteps.tolist()
        for model in self.transformers:
            align_weights(model)
        embeds: Embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        velocity = Velocity(self.run_passes)
        latents = condition.hold(latents)
        with self.progress_bar(total=len(times), desc="sampling", unit="step") as bar:
            for i, t in enumerate(scheduler.timesteps):
                self._current_timestep = t
                expert = plan.experts.serving(times[i])
                self.expect(plan.experts.after(times[i:]))
                place = previewer.place if previewer is not None else ""
                bar.set_postfix_str(", ".join(filter(None, (expert.label, place))))
                sigma = float(scheduler.sigmas[i])
                step = {"step_index": i, "sigma": sigma, "num_inference_steps": len(times)}
                # Each video goes through the model by itself: it cannot depend on its neighbours, to the last
                # bit, and a clip is long enough to fill a device.
                velocities = []
                for b in range(len(latents)):
                    inputs: dict[str, Any] = condition.model_inputs(b, latents[b : b + 1], t.reshape(1))
                    inputs["attention_kwargs"] = plan.request.attention_kwargs
                    velocities.append(velocity.guided(expert, inputs, embeds, step, b))
                predicted, before = torch.cat(velocities), latents
                latents = condition.hold(scheduler.step(predicted, t, latents, return_dict=False)[0])
                _check_finite(latents, i, times, expert)
                if previewer is not None and previewer.due(i + 1, len(times)):
                    previewer.step(
                        i + 1, len(times), expert.label, condition.hold(before - sigma * predicted)
                    )
                if plan.request.callback_on_step_end is not None:
                    latents = self._call_back(plan, i, t, latents, embeds)
                bar.update()
                stop, interrupt = self.is_asked_to_end()
                if stop and i + 1 < len(times):
                    self._recipe = replace(
                        plan.recipe, steps_done=i + 1, obstacle=f"it was stopped after step {i + 1}"
                    )
                    return condition.hold(before - sigma * predicted)
                if interrupt:
                    break
        return latents

    def _call_back(
        self, plan: Plan, i: int, t: torch.Tensor, latents: torch.Tensor, embeds: Embeds
    ) -> torch.Tensor:
        """Call the caller's function, which may replace latents and embeddings."""
        function = plan.request.callback_on_step_end
        assert function is not None, "the loop asks"
        offered = {"latents": latents, **embeds}
        replaced = function(self, i, t, {name: offered[name] for name in plan.callback_tensors}) or {}
        for name in embeds.keys() & replaced.keys():
            value = replaced[name]
            if value is None and name == "negative_prompt_embeds":
                embeds[name] = None  # the rest of the run is not guided
            elif value is not embeds[name]:
                checks.check_embeds(name, value, self.any_transformer.config.text_dim, len(latents))
                embeds[name] = pad_rows(value)
        replacement = replaced.get("latents", latents)
        checks.check_latents(replacement, tuple(latents.shape))
        return replacement.to(latents)

    def finish(self, plan: Plan, latents: torch.Tensor) -> WanVideo | WanStream | tuple[Any]:
        """Decode and wrap the result."""
        recipe = self._recipe or plan.recipe
        if plan.request.output_type == "stream":
            return WanStream(self.frames(latents), recipe.fps, recipe)
        frames = self.decode(latents, plan.request.output_type)
        if not plan.request.return_dict:
            return (frames,)
        return WanVideo(frames=frames, fps=recipe.fps, recipe=recipe)

    def make_previewer(self, plan: Plan) -> Previewer | None:
        """Return what shows the video while it is made, if that is asked for."""
        request = plan.request
        if request.preview is None or request.preview is False:
            for name in ("preview_every", "preview_decoder"):
                if getattr(request, name) is not None:
                    raise ValueError(f"{name}={getattr(request, name)!r} needs preview; preview=True")
            return None
        every, decoder = request.preview_every, request.preview_decoder
        return Previewer(request.preview, self.vae, plan.recipe.fps, every, decoder)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave the pipeline ready for the next call, however this one ends: Ctrl-C included."""
        try:
            yield
        finally:
            self._current_timestep = None
            self.restore_strengths()
            self.maybe_free_model_hooks()


def _check_finite(latents: torch.Tensor, i: int, times: Sequence[float], expert: Expert) -> None:
    """Refuse latents that are not finite, naming the step and the model."""
    if not torch.isfinite(latents).all():
        where = f"{expert.label or 'the only'} expert, pipe.{expert.slot} in {expert.model.dtype}"
        raise FloatingPointError(
            f"the latents are not finite after step {i + 1} of {len(times)} (timestep {times[i]:g}, {where})"
        )
