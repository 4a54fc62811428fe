"""The pipeline that the options of a command describe, without its weights: what checks and plans need."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import shown
from ..video.recipe import sizes_in_words
from .loading import PARTS, check_source, dtype_of, find_model, hub_options, preset_of, quantization_of
from .options import Loading
from .signatures import PIPELINES


@dataclass(frozen=True)
class Settings:
    """What a call makes, completed with the checkpoint's settings."""

    name: str
    width: int
    height: int
    num_frames: int
    fps: int
    videos: int
    steps: int
    solver: str
    shift: float | None  # None for a schedule that is given
    formula: str  # of guidance; "" for plain guidance
    guidance: tuple[float, ...]  # scales of the experts, high noise first, or of each step
    passes: int  # of a transformer, in all steps of one video; at most so many, if latents have a say
    all_passes: int  # those without a step cache
    work: float  # arithmetic of these passes, in plain ones at full size
    kinds: tuple[Any, ...]  # passes of the step that takes the most, as `wan22.accel.plan` takes them
    step_work: float  # arithmetic of these, likewise
    cache: str | None = None  # the step cache's name
    residuals: int = 0  # tensors of the tokens' size that a step cache keeps of each pass and video
    attention: str | None = None  # what sparse self-attention computes, in words
    sizes: tuple[tuple[int, int, int], ...] = ()  # width, height, steps of the parts of a resolution schedule

    def __str__(self) -> str:
        many = "" if self.videos == 1 else f"{self.videos} x "
        shift = "custom schedule" if self.shift is None else f"shift {self.shift:g}"
        formula = f"{self.formula} " if self.formula else ""
        scales = " and ".join(f"{scale:g}" for scale in self.guidance)
        parts = f" ({sizes_in_words(self.sizes)})" if self.sizes else ""
        if len(self.guidance) > 2:
            scales = f"{min(self.guidance):g} to {max(self.guidance):g}"
        return (
            f"{many}{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps "
            f"({self.num_frames / self.fps:.2g} s), {self.steps} steps{parts} of {self.solver}, {shift}, "
            f"{formula}guidance {scales}"
        )


def outlined(task: str, options: Loading, dtypes: Mapping[str, str] | None = None) -> Any:
    """Return the pipeline with its models on the meta device; None if nothing here tells their sizes.

    Of a repository that is no known release, configurations are downloaded. A ValueError says that the
    checkpoint is for another pipeline, or that options do not go together.
    """
    import wan22

    from ..pipelines.loading import load, preparing
    from ..pipelines.loading.checkpoint import Checkpoint, Wanted
    from ..pipelines.loading.official_layout import outline_of
    from ..pipelines.loading.single_files import SingleFiles, with_parts_of

    pipeline = getattr(wan22, PIPELINES[task])
    source, quantize = find_model(options.model, task), quantization_of(options)
    check_source(options, source)
    wanted = Wanted(dtype=dtype_of(options, dtypes))
    if options.prepare is not None:
        wanted, quantize = preparing.wanted_in(options.prepare, wanted, quantize)
    release = preset_of(options.model, task)
    if release is not None and release.repo and not Path(source).exists():
        return load.outlined_pipeline(pipeline, outline_of(release, wanted), wanted)
    if not Path(source).is_file():
        checkpoint: Checkpoint = load.locate(str(source), hub_options(options))
    else:
        given = {PARTS[name]: path for name, path in files_of(options).items()}
        if not all(path.exists() for name, path in given.items() if name != "tokenizer"):
            return None
        absent = [name for name in PARTS.values() if name != "transformer_2"]
        checkpoint = SingleFiles(with_parts_of(Path(source), {"transformer": Path(source)} | given, absent))
    load.check_kind(pipeline, checkpoint)
    return load.outlined_pipeline(pipeline, checkpoint.outline(wanted), wanted)


def files_of(options: Loading) -> dict[str, Path]:
    """Return the paths of the models beside a --model file; one that is nowhere is refused by its flag."""
    from ..checkpoints.files.hub import hub_file

    paths = {}
    for name in PARTS:
        if (place := getattr(options, name)) is not None:
            paths[name] = Path(place).expanduser()
            if name != "tokenizer" and not paths[name].exists() and hub_file(place) is None:
                raise FileNotFoundError(f"{name}={shown(place)}: there is no such file")
    return paths


def settings_of(pipe: Any, call: Mapping[str, Any]) -> Settings:
    """Check a call of an outlined pipeline, as the call itself does, and complete it.

    Images are read. The errors are those of the call.
    """
    import torch

    from ..accel.planning.passes import most_of
    from ..pipelines.call.attention import described
    from ..pipelines.call.caches.checked import check_schedule
    from ..pipelines.call.caches.decisions import computed_steps
    from ..pipelines.call.caches.places import places_of
    from ..pipelines.call.fast import with_fast
    from ..pipelines.call.few_steps import with_distilled
    from ..pipelines.call.noise import generators_of
    from ..pipelines.call.prepare import check, guidance_over, schedule
    from ..pipelines.call.preview import Previewer
    from ..pipelines.call.request import Request
    from ..pipelines.call.resolution import sizes_of
    from ..pipelines.call.schedule import scheduler_shift

    request = with_distilled(with_fast(pipe, pipe.with_inputs(Request.of(type(pipe).__call__, call))))
    checked = check(pipe, request)
    generators_of(request, checked.videos, lambda: 0)
    scheduler, _, steps = schedule(pipe, request, pipe.scheduler, torch.device("cpu"), checked.parts)
    check_schedule(checked.cache, request, scheduler, steps)
    guidance = guidance_over(steps, pipe, checked)
    kinds = guidance.kinds(steps)
    computed = computed_steps(checked.cache, places_of(steps))
    runs = [passes if computes else () for passes, computes in zip(kinds, computed, strict=True)]
    if request.preview is not None:
        Previewer(request.preview, pipe.vae, 1, request.preview_every, request.preview_decoder)
    attention = checked.attention
    scales = [guidance.arguments[name] for name in ("guidance_scale", "guidance_scale_2")]
    given = request.sigmas is not None or request.timesteps is not None
    shift = scheduler_shift(scheduler) if request.flow_shift is None else request.flow_shift
    return Settings(
        name=pipe.released.name if pipe.released else "unknown sizes",
        width=checked.width,
        height=checked.height,
        num_frames=checked.num_frames,
        fps=pipe.preset.fps,
        videos=checked.videos,
        steps=scheduler.num_inference_steps or len(steps),
        solver=type(scheduler).__name__.removeprefix("FlowMatch").removesuffix("Scheduler"),
        shift=None if given else shift,
        formula=(guidance.arguments["guidance"] or {}).get("name", ""),
        guidance=tuple(scales[0] if isinstance(scales[0], list) else filter(None, scales)),
        passes=sum(map(len, runs)),
        all_passes=sum(map(len, kinds)),
        work=_work(pipe, checked, zip(runs, (step.size for step in steps), strict=True)),
        kinds=most_of(kinds),
        step_work=_work(pipe, checked, [(most_of(kinds), None)]),
        cache=None if checked.cache is None else checked.cache.method,
        residuals=0 if checked.cache is None else checked.cache.residuals,
        attention=None if attention is None else described(attention, checked.grid, pipe, len(steps)),
        sizes=sizes_of(steps),
    )


def _work(pipe: Any, checked: Any, steps: Iterable[tuple[Sequence[Any], Any]]) -> float:
    """Return the arithmetic of the passes of steps at their sizes, in plain passes at full size."""
    from ..accel.planning.costs import forward_flops

    config, full = pipe.any_transformer.config, (checked.width, checked.height)
    _, per_row, per_column = config.patch_size

    def tokens(size: tuple[int, int] | None) -> int:
        width, height = size or full
        _, frames, rows, columns = pipe.latent_shape(checked.num_frames, height, width)
        return frames * (rows // per_row) * (columns // per_column)

    flops = sum(forward_flops(config, tokens(size), kind) for kinds, size in steps for kind in kinds)
    return flops / forward_flops(config, tokens(full))
