"""What every Wan pipeline shares: components, defaults, the steps of a call, the sampling loop.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns, l text tokens, d their width.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch

from ..checkpoints.loading.alignment import align_weights
from ..checks import shown
from ..presets import MAX_TEXT_TOKENS
from ..video.metadata import read_recipe
from ..video.recipe import IMAGES, Recipe, stopped_after, with_passes
from ..video.result import WanStream, WanVideo
from .attached.calls import in_turn
from .attached.provenance import scheduler_of
from .call import checks, decoding
from .call.caches.calibration import Calibration
from .call.caches.predictors import wrapped
from .call.caches.ratios import CacheRatios
from .call.call import Call
from .call.conditions import Condition
from .call.denoiser import Denoiser, GuidedDenoiser, TextEmbeds
from .call.few_steps import scales_loras
from .call.images import load_pictures
from .call.noise import draw
from .call.passes import ModelPredictor, Predictor
from .call.phases import phase
from .call.prepare import prepare
from .call.preview import Previewer
from .call.request import Prompt, Request, check_recorded
from .call.resolution import ConditionBySize, resized
from .call.schedule import take_step
from .call.text import encode_prompt, pad_tokens, warn_of_unknown_words
from .parts import PipelineParts

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def streamed(call: Callable[Concatenate[Any, P], Any]) -> Callable[Concatenate[Any, P], WanStream]:
    """Return the method `stream` that belongs to a pipeline's `__call__`, with its signature.

    Not an overload of `__call__`: with overloads, type checkers no longer name the argument that is wrong.
    """

    @wraps(call, assigned=())
    def stream(self: Any, *args: P.args, **kwargs: P.kwargs) -> WanStream:
        """Make one video whose frames are decoded as they are asked for, so that a long one needs no memory.

        It takes the arguments of the call, without output_type. Sampling is done when it returns; decoding
        starts with the first frame. The models are in use while a frame is computed, not while the caller has
        it: a stream that is read in part holds up no other call, unless ranks share the pipeline's work. Any
        thread may read it, one at a time. A frame after the VAE was moved or cast is a RuntimeError.
        """
        return self(*args, **{**kwargs, "output_type": "stream"})

    return stream


class WanPipeline(PipelineParts):
    """Base of WanT2VPipeline and WanI2VPipeline: the steps of a call; PipelineParts has the components."""

    @abstractmethod
    def make_condition(self, call: Call) -> Condition:
        """Return what the transformer gets beside text."""

    def make_conditions(self, call: Call) -> Condition:
        """Return what the transformer gets beside text, at each size that the schedule has."""
        if len(call.sizes) == 1:
            return self.make_condition(call)
        cells = {size: self.latent_shape(1, size[1], size[0])[2:] for size in call.sizes}
        return ConditionBySize({cells[size]: self.make_condition(call.at(size)) for size in call.sizes})

    def make_denoiser(self, call: Call, embeds: TextEmbeds, condition: Condition) -> Denoiser:
        """Return what predicts the velocity of a step."""
        return GuidedDenoiser(self.make_predictor(call, condition), embeds, call.guidance, call.state)

    def make_predictor(self, call: Call, condition: Condition) -> Predictor:
        """Return what runs the transformer for the passes of a step, or skips some by the call's cache."""
        model = ModelPredictor(condition, call.state, self.ranks.run_passes, call.attention)
        return wrapped(model, call, self.ranks)

    # ---- a call, and its steps ----

    @torch.no_grad()
    def run(self, request: Request) -> Any:
        """Carry out a call: check it, encode, prepare, denoise, decode."""
        with self.calls.begin(request.attention_kwargs, scales_loras(request)) as begun:  # stop() is heard
            request = self.with_inputs(request)
            with self.calls.in_turn(begun):
                start = time.perf_counter()
                self.provenance.check_files()
                call = prepare(self, request, begun.state)
                previewer = self.make_previewer(call)
                self.calls.started(begun.state)
                logger.info("%s", call.recipe)
                with self.running():
                    with phase(self, "encoding the prompt", call.size):
                        embeds = self.encode(call)
                    with phase(self, "encoding the image", call.size):
                        condition = self.make_conditions(call)
                    latents = self.draw_latents(call)
                    latents = self.denoise(call, latents, embeds, condition, previewer)
                    result = self.finish(call, latents)
                    if isinstance(result, WanVideo):
                        result.seconds = time.perf_counter() - start
                    return result

    def with_inputs(self, request: Request) -> Request:
        """Return a request whose files, such as images, are read."""
        return request

    def reproduce(self, source: str | Path | Recipe, *, anyway: bool = False, **changes: Any) -> WanVideo:
        """Make a video again: on the same kind of machine the same frames, on a CPU to the bit.

        Args:
            source: file that `WanVideo.save` wrote, or a recipe.
            anyway: whether to make a video, with warnings, where it is known to be another than the recipe's.
            **changes: arguments of the call in place of the recipe's: another prompt or seed, say. A recipe
                that was read may be anybody's: images that it names are not opened, give `image` and
                `last_image`; and so where the recipe's were in memory. They must be the same pictures.

        Returns: the video.

        Raises:
            FileNotFoundError: there is no such file, or an image is not where it was.
            ValueError: the file carries no recipe, or another pipeline's; an image or a prompt must be
                given; or, unless `anyway`, the recipe is of another checkpoint, other LoRAs, pictures or
                settings of the pipeline than are here, or the video cannot be made again from it.
        """
        recipe = source if isinstance(source, Recipe) else read_recipe(source)
        if self.memory.plans_next:  # the plan is part of how the pipeline stands
            with self.calls.using_models():
                self.memory.make_room(recipe.height, recipe.width, recipe.num_frames, len(recipe.seeds))
        self.provenance.check(recipe, anyway)
        check_recorded(recipe, self.__call__, changes)
        arguments = {**recipe.call, **changes}
        pictures = {name: load_pictures(name, arguments[name]) for name in IMAGES if arguments.get(name)}
        self.provenance.check_pictures(recipe, pictures, anyway)
        arguments |= pictures
        with self.calls.using(scheduler_of(recipe, self.scheduler)):
            return self(**arguments)

    def calibrate_cache(self, prompt: Prompt, **arguments: Any) -> CacheRatios:
        """Measure, in one call that skips nothing, the ratios that `cache="mag"` goes by.

        They are those of the checkpoint and the schedule: measure with the shift and the steps that are to be
        used. A few prompts are enough, as ratios differ little from one to the next.

        Args:
            prompt: one or several.
            **arguments: of the call, for image to video with `image`; no video is decoded.

        Returns: the ratios; `cache=` takes them, or the file that their `save` writes.
        """
        calibration = Calibration()
        given = {"output_type": "latent", **arguments, "cache": calibration, "return_dict": True}
        recipe = self(prompt=prompt, **given).recipe
        shift = recipe.call.get("flow_shift")
        return CacheRatios(calibration.ratios(self.ranks), shift, self.checkpoint_name)

    def stop(self) -> None:
        """Let the running calls end with their current step: each returns the video as it would become.

        For another thread, or a signal's handler; a callback stops its own call. The recipe tells after how
        many steps.
        """
        for state in self.calls.addressed:
            state.stop = True

    @in_turn
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
            num_videos_per_prompt: how often each prompt's embeddings are repeated.
            prompt_embeds: in place of prompt, "b l d" with l up to 512.
            negative_prompt_embeds: in place of negative_prompt.
            max_sequence_length: tokens at which a prompt is cut; the result has 512 in any case.
            device: device of the result; default is the transformer's.
            dtype: dtype of the result; default is the text encoder's.

        Returns: embeddings of prompt and negative prompt, each "b 512 d"; None for the latter without
            guidance.
        """
        self.memory.ready()
        device = device or self._execution_device
        align_weights(self.text_encoder)
        known: dict[str, torch.Tensor] = {}

        def encoded(texts: list[str]) -> torch.Tensor:
            for text in texts:
                if text not in known:
                    known[text] = encode_prompt(self.tokenizer, self.text_encoder, text, max_sequence_length)
            return torch.cat([known[text] for text in texts])

        def finished(embeds: torch.Tensor) -> torch.Tensor:
            return pad_tokens(embeds).repeat_interleave(num_videos_per_prompt, 0).to(device, dtype)

        with torch.no_grad():
            if prompt_embeds is None:
                prompt_embeds = encoded(checks.as_prompts("prompt", prompt))
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                negative_prompt = "" if negative_prompt is None else negative_prompt
                negatives = checks.as_prompts("negative_prompt", negative_prompt, len(prompt_embeds))
                negative_prompt_embeds = encoded([text or self.preset.negative_prompt for text in negatives])
            negative = finished(negative_prompt_embeds) if negative_prompt_embeds is not None else None
            prompt_embeds = finished(prompt_embeds)
            negative_prompt_embeds = negative if do_classifier_free_guidance else None
            return prompt_embeds, negative_prompt_embeds

    def encode(self, call: Call) -> TextEmbeds:
        """Encode a call's prompts and negative prompts: "b 512 d" each, one entry per video."""
        request, released = call.request, self.released
        if released is not None and not released.repo:
            warn_of_unknown_words(self.tokenizer, call.prompts, released.name)
        positive, negative = self.encode_prompt(
            [text or "" for text in call.prompts] if request.prompt_embeds is None else None,
            [text or "" for text in call.negative_prompts]
            if request.negative_prompt_embeds is None
            else None,
            call.guided,
            request.num_videos_per_prompt,
            request.prompt_embeds,
            request.negative_prompt_embeds,
            request.max_sequence_length,
        )
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def draw_latents(self, call: Call) -> torch.Tensor:
        """Draw each video's noise from its own generator, or take the given latents; "b c t h w", float32."""
        device, given, recipe = self._execution_device, call.request.latents, call.recipe
        if given is not None:
            latents = given.to(device, torch.float32)
        else:
            width, height = call.sizes[0]
            shape = self.latent_shape(recipe.num_frames, height, width)
            latents = draw(call.generators, shape, device)
        return latents if call.few_steps is None else call.few_steps.noise_scale * latents

    def denoise(
        self,
        call: Call,
        latents: torch.Tensor,
        embeds: TextEmbeds,
        condition: Condition,
        previewer: Previewer | None = None,
    ) -> torch.Tensor:
        """Run the sampling loop.

        Args:
            call: steps, solver, guidance, callback.
            latents: noise, "b c t h w" float32.
            embeds: "prompt_embeds", and "negative_prompt_embeds" unless no step is guided, "b 512 d".
            condition: what the transformer gets beside latents and text.
            previewer: shows the video while it is made.

        Returns: "b c t h w", float32.

        Raises:
            FloatingPointError: the latents are no longer finite.
        """
        self._align_transformers()
        denoiser = self.make_denoiser(call, embeds, condition)
        latents, finite = condition.overwrite_known_frames(latents), checks.FiniteCheck(latents.device)
        with self.progress_bar(total=len(call.steps), desc="sampling", unit="step") as bar:
            for step in call.steps:
                call.state.current_timestep = step.timestep
                step.expert.check_loaded(step.timestep)  # a callback may have freed it
                self.memory.prefetch_next(step.next_expert)
                place = previewer.place if previewer is not None else ""
                skipped = f"{n} skipped" if (n := call.state.skipped_steps) else ""
                bar.set_postfix_str(", ".join(filter(None, (step.expert.label, skipped, place))))
                where = ", ".join(filter(None, (f"step {step.number} of {step.count}", step.expert.label)))
                with phase(self, f"denoising, {where}", call.size):
                    velocity = denoiser(latents, step)
                clean = condition.overwrite_known_frames(latents - step.sigma * velocity)
                latents = take_step(call.state, velocity, step.timestep, latents, call.generators)
                latents = condition.overwrite_known_frames(latents)
                finite.add(latents, step)
                if previewer is not None:
                    previewer.step(step.number, step.count, step.expert.label, clean)
                if call.callback is not None:
                    latents = call.callback(self, step, latents, embeds)
                    latents = condition.overwrite_known_frames(latents)
                    self._align_transformers()
                bar.update()
                stop, interrupt = self.ranks.any(call.state.stop, call.state.interrupt)
                if stop and not step.is_last:
                    call.state.recipe, latents = stopped_after(step.number, call.recipe), clean
                    break
                if interrupt:
                    break
            finite.finish()
        # A call that was stopped may be at a smaller size than it was asked for.
        return resized(latents, self.latent_shape(1, call.recipe.height, call.recipe.width)[2:])

    def _align_transformers(self) -> None:
        """Bring the weights where kernels want them, those of models that a callback put in place, too."""
        for model in self.transformers:
            align_weights(model)

    def finish(self, call: Call, latents: torch.Tensor) -> WanVideo | WanStream | tuple[Any]:
        """Decode and wrap the result."""
        recipe, request = with_passes(call.state.recipe or call.recipe, call.state.passes), call.request
        result: WanVideo | WanStream
        if request.output_type == "stream":
            result = WanStream(self.frames(latents), recipe.fps, recipe)
        else:
            with phase(self, "decoding", call.size):
                frames = self.decode(latents, request.output_type)
            if not request.return_dict:
                return (frames,)
            result = WanVideo(frames=frames, fps=recipe.fps, recipe=recipe)
        result.writes = self.ranks.first
        return result

    def frames(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """Decode one video's latents "1 c t h w" to frames "h w 3" in uint8, as they are asked for."""
        self.check_vae("decoding")
        # Ranks would have to agree on what comes between two frames.
        whole = self.calls.using_models if self.parallel is not None else nullcontext
        retry = not self.ranks.shares_rows
        t, rows, columns = latents.shape[2:]
        size = {
            "height": rows * self.vae_scale_factor_spatial,
            "width": columns * self.vae_scale_factor_spatial,
            "num_frames": 1 + (t - 1) * self.vae_scale_factor_temporal,
        }

        @contextmanager
        def computing() -> Iterator[None]:
            with self.calls.using_models(), phase(self, "decoding", size):
                yield

        try:
            with whole():
                frames = decoding.stream_frames(self.vae, latents, self.progress_bar, retry, computing)
                yield from self.ranks.frames_here(frames, self.vae)
        finally:
            self.calls.when_idle(self.maybe_free_model_hooks)

    @in_turn
    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np") -> Any:
        """Decode normalised latents, video by video and chunk by chunk.

        Args:
            latents: "b c t h w".
            output_type: "np", "pt", "pil" or "latent", as in WanVideo.frames.

        Raises:
            ValueError: there is no VAE.
            FloatingPointError: the VAE produced values that are not finite.
        """
        if output_type != "latent":
            self.check_vae("decoding")
        retry = not self.ranks.shares_rows  # a rank by itself cannot go on in other pieces
        return decoding.decode(self.vae, latents, output_type, self.progress_bar, retry)

    def make_previewer(self, call: Call) -> Previewer | None:
        """Return what shows the video while it is made, if that is asked for."""
        request = call.request
        if request.preview is None or request.preview is False:
            for name in ("preview_every", "preview_decoder"):
                if getattr(request, name) is not None:
                    raise ValueError(f"{name}={shown(getattr(request, name))} needs preview; preview=True")
            return None
        if not self.ranks.first:
            return None
        self.check_vae("preview")
        every, decoder = request.preview_every, request.preview_decoder
        return Previewer(request.preview, self.vae, call.recipe.fps, every, decoder)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave the pipeline ready for the next call, however this one ends: Ctrl-C included."""
        try:
            yield
        finally:
            self.maybe_free_model_hooks()
