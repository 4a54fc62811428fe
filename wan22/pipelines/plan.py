"""Checks a request and completes it with the checkpoint's official settings, before any work."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..checks import as_int, check_choice, check_num_frames, check_positive_int, check_size
from ..presets import FEW_STEPS, MAX_TEXT_TOKENS
from ..schedulers import FlowMatchEulerScheduler
from ..video.recipe import Recipe
from ..video.result import OUTPUT_TYPES
from . import checks
from .experts import Experts
from .request import Plan, Request
from .schedule import scheduler_shift, set_schedule

if TYPE_CHECKING:
    from .base import WanPipeline


def make_plan(pipe: "WanPipeline", request: Request) -> Plan:
    """Check a request and complete it.

    Raises:
        ValueError: an argument breaks its rule; the message names the value, the rule and the nearest valid
            value.
    """
    pipe.check_components()  # one may have been replaced since
    request = _with_recipe(request)
    check_choice("output_type", request.output_type, OUTPUT_TYPES)
    check_positive_int("num_videos_per_prompt", request.num_videos_per_prompt)
    check_positive_int("max_sequence_length", request.max_sequence_length, most=MAX_TEXT_TOKENS)
    prompts, negatives = _prompts(pipe, request)
    if request.output_type == "stream" and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} videos cannot be streamed together; ask for one at a time")
    height, width, num_frames = _size(pipe, request)
    if request.latents is not None:
        checks.check_latents(request.latents, (len(prompts), *pipe.latent_shape(num_frames, height, width)))
    generators = _generators(pipe, request, len(prompts))
    callback_tensors = _callback_tensors(request, pipe._callback_tensor_inputs)
    scheduler = _scheduler(pipe, request)
    experts = _experts(pipe, request, scheduler)
    guided = experts.guided(scheduler.timesteps.tolist())
    _check_text_encoder(pipe, request, guided)
    custom = request.sigmas is not None or request.timesteps is not None
    shift = scheduler_shift(scheduler) if request.flow_shift is None else request.flow_shift
    recipe = Recipe(
        checkpoint=pipe.checkpoint_name,
        prompts=prompts,
        negative_prompts=negatives if guided else (None,) * len(prompts),
        seeds=_seeds(request, generators),
        height=height,
        width=width,
        num_frames=num_frames,
        fps=pipe.preset.fps,
        scheduler=type(scheduler).__name__,
        num_inference_steps=len(scheduler.timesteps),
        flow_shift=None if custom else shift,
        guidance_scale=experts.high.guidance_scale,
        guidance_scale_2=None if experts.boundary is None else experts.low.guidance_scale,
        boundary_ratio=pipe.config.boundary_ratio,
        timesteps=_numbers(request.timesteps),
        sigmas=_numbers(request.sigmas),
        few_steps=request.recipe,
        max_sequence_length=request.max_sequence_length,
        attention_kwargs=request.attention_kwargs,
        noise_device=generators[0].device.type,
        max_area=pipe.followed_area(request),
        obstacle=_obstacle(request, generators, guided),
        **request.recorded(),
        **pipe.circumstances(),
    )
    return Plan(request, recipe, generators, scheduler, experts, guided, callback_tensors)


def _with_recipe(request: Request) -> Request:
    """Fill in what a recipe asked for by its name says."""
    if request.recipe is None:
        return request
    check_choice("recipe", request.recipe, tuple(FEW_STEPS))
    for name in ("num_inference_steps", "flow_shift", "sigmas", "timesteps"):
        if getattr(request, name) is not None:
            raise ValueError(f"recipe={request.recipe!r} has its own timesteps; leave {name} out")
    few = FEW_STEPS[request.recipe]
    scale = few.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return replace(request, timesteps=few.timesteps, guidance_scale=scale)


def _prompts(pipe: "WanPipeline", request: Request) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Return prompt and negative prompt of each video; None where embeddings were given."""
    width = pipe.any_transformer.config.text_dim
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise ValueError("give prompt or prompt_embeds, and only one of them")
    if request.prompt_embeds is not None:
        checks.check_embeds("prompt_embeds", request.prompt_embeds, width, request.prompt_count)
        prompts: list[str | None] = [None] * len(request.prompt_embeds)
    else:
        prompts = list(checks.as_prompts("prompt", request.prompt, request.prompt_count))
    if request.negative_prompt_embeds is not None:
        if request.negative_prompt is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
        checks.check_embeds("negative_prompt_embeds", request.negative_prompt_embeds, width, len(prompts))
        negatives: list[str | None] = [None] * len(prompts)
    else:
        text = "" if request.negative_prompt is None else request.negative_prompt
        texts = checks.as_prompts("negative_prompt", text, len(prompts))
        negatives = [text or pipe.preset.negative_prompt for text in texts]
    repeat = request.num_videos_per_prompt
    return tuple(p for p in prompts for _ in range(repeat)), tuple(
        n for n in negatives for _ in range(repeat)
    )


def _check_text_encoder(pipe: "WanPipeline", request: Request, guided: bool) -> None:
    """Refuse text that nothing can encode."""
    texts = {"prompt": request.prompt_embeds is None}
    texts["negative_prompt"] = guided and request.negative_prompt_embeds is None
    for name, needed in texts.items():
        for component in ("text_encoder", "tokenizer"):
            if needed and getattr(pipe, component) is None:
                raise ValueError(
                    f"pipe.{component} is None; load it, or give {name}_embeds instead of {name}"
                )


def _size(pipe: "WanPipeline", request: Request) -> tuple[int, int, int]:
    """Return height, width and frames: the given ones, or the checkpoint's."""
    patch = pipe.any_transformer.config.patch_size
    height, width = as_int(request.height), as_int(request.width)
    if height is None or width is None:
        default_height, default_width = pipe.default_size(request)
        height = default_height if height is None else height
        width = default_width if width is None else width
    num_frames = pipe.preset.num_frames if request.num_frames is None else as_int(request.num_frames)
    check_size("height", height, pipe.vae.spatial_stride * patch[1])
    check_size("width", width, pipe.vae.spatial_stride * patch[2])
    check_num_frames(num_frames, pipe.vae.temporal_stride)
    return height, width, num_frames


def _generators(pipe: "WanPipeline", request: Request, count: int) -> list[torch.Generator]:
    """Return one generator per video; a single seed s gives the videos s, s + 1, …"""
    if request.generator is not None:
        if request.seed is not None:
            raise ValueError("seed and generator are both given; give one")
        if request.noise_device is not None:
            raise ValueError("noise_device and generator are both given; a generator draws on its own device")
        given = request.generator
        generators = list(given) if isinstance(given, Sequence) else [given] * count
        for generator in generators:
            if not isinstance(generator, torch.Generator):
                described = checks.describe(generator)
                raise ValueError(f"generator must be a torch.Generator, or one per video, not {described}")
        if len(generators) != count:
            raise ValueError(f"{len(generators)} generators for {count} videos; give {count}, or one")
        return generators
    seed = pipe.draw_seed() if request.seed is None else request.seed
    given_seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
    given_seeds = [as_int(value) for value in given_seeds]
    for value in given_seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            nearest = min(max(value, 0), 2**63 - 1) if isinstance(value, int) else 0
            raise ValueError(f"seed={value!r} must be an int from 0 to 2**63 - 1; the nearest is {nearest:d}")
    alone = not isinstance(seed, Sequence)
    seeds = [given_seeds[0] + i for i in range(count)] if alone else given_seeds
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} videos; give {count}, or one")
    try:
        return [torch.Generator(request.noise_device or "cpu").manual_seed(value) for value in seeds]
    except (RuntimeError, AssertionError) as error:
        device = request.noise_device
        raise ValueError(f"noise_device={device!r} is not there to draw on; 'cpu' always is") from error


def _seeds(request: Request, generators: list[torch.Generator]) -> tuple[int | None, ...]:
    """Return each video's seed; None where it cannot be told."""
    if request.latents is not None:
        return (None,) * len(generators)
    first_of_shared = isinstance(request.generator, torch.Generator)
    return tuple(None if first_of_shared and i else g.initial_seed() for i, g in enumerate(generators))


def _obstacle(request: Request, generators: list[torch.Generator], guided: bool) -> str | None:
    """Return why a recipe is not enough to make the videos again; None if it is."""
    for name in ("latents", "prompt_embeds", "negative_prompt_embeds", "image_embeds"):
        if getattr(request, name, None) is not None and (guided or name != "negative_prompt_embeds"):
            return f"{name} were given"
    if isinstance(request.generator, torch.Generator) and len(generators) > 1:
        return "the videos' noise was drawn from one generator"
    if request.generator is not None:
        for g in generators:
            fresh = torch.Generator(g.device).manual_seed(g.initial_seed())
            if not torch.equal(g.get_state(), fresh.get_state()):
                return "the generator had been drawn from before"
    return None if request.callback_on_step_end is None else "callback_on_step_end took part"


def _numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return a list of numbers as plain ones."""
    return None if values is None else tuple(float(value) for value in values)


def _callback_tensors(request: Request, allowed: Sequence[str]) -> Sequence[str]:
    """Return the tensors that the callback asks for."""
    function, tensors = request.callback_on_step_end, request.callback_on_step_end_tensor_inputs or ()
    if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
        tensors = function.tensor_inputs
    for name in tensors:
        check_choice("callback_on_step_end_tensor_inputs", name, allowed)
    return tensors


def _scheduler(pipe: "WanPipeline", request: Request) -> Any:
    """Return the scheduler with the call's schedule set."""
    steps = as_int(request.num_inference_steps)
    if steps is None and request.sigmas is None and request.timesteps is None:
        steps = pipe.preset.num_inference_steps
    if steps is not None:
        check_positive_int("num_inference_steps", steps)
    device = pipe._execution_device
    scheduler = FlowMatchEulerScheduler() if request.recipe else pipe.scheduler
    return set_schedule(scheduler, device, steps, request.flow_shift, request.sigmas, request.timesteps)


def _experts(pipe: "WanPipeline", request: Request, scheduler: Any) -> Experts:
    """Return the experts with their guidance: the given scales or the checkpoint's; one serves both."""
    preset, ratio = pipe.preset, pipe.config.boundary_ratio
    first, second = request.guidance_scale, request.guidance_scale_2
    if second is not None and ratio is None:
        raise ValueError(f"guidance_scale_2={second!r} is for checkpoints of two experts; use guidance_scale")
    if second is None:
        second = preset.guidance_scale_2 if first is None else first
    if first is None:
        first = preset.guidance_scale
    second = first if second is None else second
    checks.check_guidance("guidance_scale", first)
    checks.check_guidance("guidance_scale_2", second)
    boundary = None if ratio is None else ratio * scheduler.config.num_train_timesteps
    experts = Experts(pipe.transformer, pipe.transformer_2, boundary, (first, second))
    experts.needed(scheduler.timesteps.tolist())
    return experts
