"""Checks a request and completes it with the checkpoint's official settings, before any work."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...accel.planning.passes import most_of
from ...accel.sparse.settings import Grid, SparseAttention
from ...checkpoints.loading.diffusers_caches import check_cache_for_passes
from ...checks import check_choice, check_num_frames, check_positive_int, check_size, shown
from ...presets import MAX_TEXT_TOKENS
from ...private_apis import cache_config
from ...video.recipe import Recipe
from ...video.result import OUTPUT_TYPES
from ..parts import PipelineParts
from .attention import checked_attention, described
from .caches.checked import check_schedule, checked_cache
from .caches.settings import StepCache
from .call import Call
from .callback import StepCallback
from .checks import check_latents
from .experts import Experts, Step
from .fast import with_fast
from .few_steps import check_scale, hint_at_settings, lora_scales, with_distilled
from .guidance.guider import Guider
from .guidance.named import as_guider, not_recordable
from .guidance.scales import CheckedGuidance, Guidance, check_interval, check_scales
from .noise import generators_of, not_reproducible_because, seeds_of
from .request import Request, plain
from .resolution import (
    Part,
    SizedSolver,
    checked_parts,
    read_resolution_schedule,
    sizes_of,
    stages_of,
)
from .schedule import changed_by_hand, scheduler_for, scheduler_shift
from .state import CallState
from .text import check_prompts, check_text_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """What a request asks for, checked and completed, but for noise and schedule."""

    prompts: list[str | None]  # one per prompt; None where embeddings were given
    negative_prompts: list[str | None]
    videos: int
    height: int
    width: int
    num_frames: int
    guidance: CheckedGuidance
    callback: StepCallback | None
    cache: StepCache | None
    attention: SparseAttention | None
    grid: Grid
    parts: tuple[Part, ...]  # of a schedule in which the size changes


def check(pipe: PipelineParts, request: Request) -> Checked:
    """Check a request; a ValueError names the value, the rule and the nearest valid value."""
    pipe.check_components()  # one may have been replaced since
    for model in pipe.transformers:
        check_cache_for_passes(cache_config(model))
    check_choice("output_type", request.output_type, OUTPUT_TYPES)
    check_scale(pipe, request.attention_kwargs)
    check_positive_int("num_videos_per_prompt", request.num_videos_per_prompt)
    check_positive_int("max_sequence_length", request.max_sequence_length, most=MAX_TEXT_TOKENS)
    text_dim, negative = pipe.any_transformer.config.text_dim, pipe.preset.negative_prompt
    prompts, negatives = check_prompts(request, text_dim, negative, pipe.prompt_count(request))
    videos = len(prompts) * request.num_videos_per_prompt
    if request.output_type == "stream" and videos > 1:
        raise ValueError(f"{videos} videos cannot be streamed together; ask for one at a time")
    height, width, num_frames = _size(pipe, request)
    parts = checked_parts(pipe, request, (width, height))
    if request.latents is not None:
        w, h = parts[0].size if parts else (width, height)  # noise to start from
        check_latents(request.latents, (videos, *pipe.latent_shape(num_frames, h, w)))
    callback = _callback(request, pipe._callback_tensor_inputs)
    guidance = _guidance(pipe, request)
    cache, grid = checked_cache(pipe, request), pipe.token_grid(num_frames, height, width)
    attention = checked_attention(pipe, request, grid)
    sizes = videos, height, width, num_frames
    return Checked(prompts, negatives, *sizes, guidance, callback, cache, attention, grid, parts)


def prepare(pipe: PipelineParts, given: Request, state: CallState) -> Call:
    """Check a request and complete it; a ValueError names the value, the rule and the nearest valid value."""
    preset, given = pipe.preset, with_fast(pipe, given)
    request = with_distilled(given)
    checked = check(pipe, request)
    if request.output_type != "latent":
        pipe.check_vae(f"output_type={shown(request.output_type)}", "output_type='latent' needs none")
    if state.scheduler is None:
        raise ValueError("pipe.scheduler is None; set it to one of wan22.schedulers")
    given_scheduler, device = state.scheduler, pipe._execution_device
    with state.stepping:
        scheduler, solver, steps = schedule(pipe, request, given_scheduler, device, checked.parts)
    check_schedule(checked.cache, request, scheduler, steps)
    guidance = guidance_over(steps, pipe, checked)
    _make_room(pipe, checked, guidance, steps)
    if pipe._execution_device != device:  # a plan was made, which says where
        device = pipe._execution_device
        with state.stepping:
            scheduler, solver, steps = schedule(pipe, request, given_scheduler, device, checked.parts)
    if checked.attention is not None:
        model = pipe.any_transformer
        checked.attention.check_device(device, model.dtype, model.config.attention_head_dim)
    generators = generators_of(request, checked.videos, pipe.draw_seed)
    count = scheduler.num_inference_steps or len(steps)  # a step of Heun's method has two timesteps
    guided = guidance.needs_negative(steps)
    check_text_encoder(pipe, request, guided)
    completed: dict[str, Any] = {
        "prompt": checked.prompts,
        "negative_prompt": checked.negative_prompts if guided else None,
        "seed": seeds_of(request, generators),
        "noise_device": generators[0].device.type,
        "num_frames": checked.num_frames,
        **guidance.arguments,
        "cache": None if checked.cache is None else checked.cache.plain(),
        "attention": None if checked.attention is None else checked.attention.plain(),
        "resolution_schedule": read_resolution_schedule(request.resolution_schedule),
        **_completed_schedule(given, scheduler, count),
        **_completed_size(checked.height, checked.width, pipe.followed_area(request)),
    }
    recipe = Recipe(
        call=given.recorded() | {name: plain(value) for name, value in completed.items()},
        width=checked.width,
        height=checked.height,
        num_frames=checked.num_frames,
        fps=preset.fps,
        scheduler=type(scheduler).__name__,
        num_inference_steps=count,
        pictures=request.image_marks(),
        sizes=sizes_of(steps),
        not_reproducible_because=not_reproducible_because(request, generators, guided)
        or not_recordable(guidance.guider)
        or changed_by_hand(state.scheduler),
        **pipe.run_metadata(),
    )
    hint_at_settings(recipe)
    if checked.attention is not None:
        logger.info("%s", described(checked.attention, checked.grid, pipe, len(steps)))
    state.scheduler = solver
    state.start(recipe, guided, len(steps))
    texts = checked.prompts, checked.negative_prompts
    return Call(
        *(request, recipe, *texts, generators, state, steps, guidance, guided),
        callback=checked.callback,
        few_steps=request.distilled,
        cache=checked.cache,
        attention=checked.attention,
    )


def _make_room(pipe: PipelineParts, checked: Checked, guidance: Guidance, steps: Sequence[Step]) -> None:
    """Let a call's models be kept where its size, its passes and its cache leave room for them."""
    residuals = 0 if checked.cache is None else checked.cache.residuals
    sizes = checked.height, checked.width, checked.num_frames, checked.videos
    pipe.memory.make_room(*sizes, residuals, most_of(guidance.kinds(steps)))


def schedule(
    pipe: Any, request: Request, scheduler: Any, device: torch.device, parts: Sequence[Part]
) -> tuple[Any, Any, list[Step]]:
    """Return a request's scheduler, its schedule set; what takes the steps; and these, with their experts."""
    scheduler = scheduler_for(request, scheduler, device, pipe.preset.num_inference_steps)
    ratio = pipe.config.boundary_ratio
    boundary = None if ratio is None else ratio * scheduler.config.num_train_timesteps
    settings = request.distilled
    experts, scales = Experts(pipe, boundary, settings), lora_scales(pipe, settings)
    if not parts:
        return scheduler, scheduler, experts.steps(scheduler, scales)
    solver = SizedSolver(stages_of(pipe, request, scheduler, parts))
    return scheduler, solver, solver.sized(experts.steps(solver, scales))


def guidance_over(steps: Sequence[Step], pipe: PipelineParts, checked: Checked) -> Guidance:
    """Return the guidance of a schedule's steps; a ValueError says what does not go with their number."""
    return checked.guidance.over(steps, experts=1 if pipe.config.boundary_ratio is None else 2)


def _size(pipe: PipelineParts, request: Request) -> tuple[int, int, int]:
    """Return height, width and frames: the given ones, or the checkpoint's."""
    patch = pipe.any_transformer.config.patch_size
    height, width = request.height, request.width
    if height is None or width is None:
        default_height, default_width = pipe.default_size(request)
        height = default_height if height is None else height
        width = default_width if width is None else width
    num_frames = pipe.preset.num_frames if request.num_frames is None else request.num_frames
    check_size("height", height, pipe.vae_scale_factor_spatial * patch[1])
    check_size("width", width, pipe.vae_scale_factor_spatial * patch[2])
    check_num_frames(num_frames, pipe.vae_scale_factor_temporal)
    return height, width, num_frames


def _guidance(pipe: PipelineParts, request: Request) -> CheckedGuidance:
    """Return the guidance: the formula's own scale, the given ones, or the checkpoint's.

    One scale serves both experts.
    """
    guider = as_guider(request.guidance)
    guider.check(pipe.transformers)
    if guider.own_scale is not None:
        return _at_own_scale(guider, guider.own_scale, request)
    first, second = request.guidance_scale, request.guidance_scale_2
    if second is not None and pipe.config.boundary_ratio is None:
        raise ValueError(
            f"guidance_scale_2={shown(second)} is for checkpoints of two experts; use guidance_scale"
        )
    if first is None:
        first, preset = pipe.preset.guidance_scale, pipe.preset.guidance_scale_2
        second = preset if second is None else second
    scales = check_scales(first, second)
    return CheckedGuidance(guider, *scales, check_interval(request.guidance_interval))


def _at_own_scale(guider: Guider, scale: float, request: Request) -> CheckedGuidance:
    """Return the guidance by a formula with a scale of its own; refuse another one."""
    given = {name: getattr(request, name) for name in ("guidance_scale", "guidance_scale_2")}
    if request.guidance_interval is not None:
        raise ValueError(f"guidance={shown(guider.name)} is on in all steps; leave guidance_interval out")
    for name, value in given.items():
        if value is not None and value != scale:
            raise ValueError(
                f"{name}={shown(value)}, and guidance={shown(guider.name)} runs at a scale of {scale:g}; "
                f"leave {name} out"
            )
    return CheckedGuidance(guider, scale, scale, None)


def _callback(request: Request, allowed: Sequence[str]) -> StepCallback | None:
    """Return the caller's function after each step, if any."""
    function, tensors = request.callback_on_step_end, request.callback_on_step_end_tensor_inputs or ()
    for name in tensors:
        check_choice("callback_on_step_end_tensor_inputs", name, allowed)
    return None if function is None else StepCallback(function, tensors, allowed)


def _completed_schedule(request: Request, scheduler: Any, count: int) -> dict[str, Any]:
    """Return a call's arguments about the schedule: its name, its values, or the steps and the shift."""
    if request.distilled is not None or request.sigmas is not None or request.timesteps is not None:
        return {}
    shift = scheduler_shift(scheduler) if request.flow_shift is None else request.flow_shift
    return {"num_inference_steps": count, "flow_shift": shift}


def _completed_size(height: int, width: int, area: int | None) -> dict[str, Any]:
    """Return a call's arguments about the size, which may follow an image within an area."""
    return {"height": height, "width": width} if area is None else {"max_area": area}
