"""The fastest way to make a video within a memory budget that leaves the result as it is.

Times are the slower one of arithmetic and copies, at rates measured on the machine.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...checkpoints.deferred import DeferredWeight, deferred_weights
from ...checkpoints.loading.alignment import unaligned_weights
from ...checkpoints.loading.models import is_ours
from ...checks import as_number, check_num_frames, check_positive_int, check_size
from ...devices import card
from ...host_memory import FileMappings, anonymous_bytes
from ...models.autoencoder import strides_of
from ...models.autoencoder_memory import STRIPS
from ...presets import Preset
from ..offload.layout import Placement, Source, blocks_of, bytes_of, on_host
from ..offload.transfer import CHUNK_BYTES, CHUNKS
from ..quantization.layers import needs_quantizing
from ..quantization.settings import Quantization
from ..quantize import quantize as quantize_model
from .costs import Task
from .machine import GB, Machine
from .meta_models import meta_copies, released_models
from .passes import GUIDED, UNGUIDED, PassKind
from .plans import Phase, Plan

# Parts of the tokens that blocks compute one after the other where memory is short: more save little.
CHUNKS_OF_TOKENS = 16
# Memory of the libraries underneath: on a device cuBLAS's workspaces; on the host the buffers of BLAS and
# oneDNN, and what the allocator does not give back (0.15 to 0.2 GB, measured).
WORKSPACE, HOST_WORKSPACE = 64 * 2**20, 160 * 2**20


_HOST = ("cpu", "meta")


class Computing(NamedTuple):
    """How blocks compute; the arguments of `Task.denoise`."""

    chunks: int = 1  # parts of the tokens, one after the other
    in_turn: bool = False  # all passes of all videos, before the next block's weights come


def plan(
    target: Any,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    vram: str | float | None = None,
    ram: str | float | None = None,
    disk: str | float | None = None,
    *,
    videos: int = 1,
    residuals: int = 0,
    quantize: str | Quantization | None = None,
    guided: bool = True,
    passes: Sequence[PassKind] | None = None,
    device: str | torch.device | None = None,
) -> Plan:
    """Find the fastest way to make a video that fits, without changing the result.

    Args:
        target: a pipeline, or a preset of `wan22.presets` (its bf16 checkpoint then).
        height: pixels, a multiple of 16 (TI2V-5B: 32); default is the checkpoint's own.
        width: pixels, a multiple of 16 (TI2V-5B: 32); default is the checkpoint's own.
        num_frames: 1 + a multiple of 4; default is the checkpoint's own.
        vram: device memory, CUDA's context included: "12GB" (1e9 bytes each), "11.5GiB", or bytes; default
            is what is free.
        ram: host memory, in the forms of vram; default is what is free but for a tenth, which is left to
            other programs.
        disk: bytes a second that weights are read with where host memory is short of them.
        videos: number of videos of a call, of all prompts.
        residuals: tensors of the tokens' size that a step cache keeps of each pass and video: none without
            one and for EasyCache, 1 for MagCache, order + 1 for TaylorCache.
        quantize: "fp8", "int8" or "fp8_dynamic" plans for quantised transformers: that changes the result.
            `wan22.Quantization`, or its text, plans for one expert, or for blocks in full precision.
        guided: whether steps have two passes.
        passes: in place of guided, those of the step that takes the most, where guidance has others: a pass
            of fewer layers, or one whose cross-attention keeps away from a negative prompt.
        device: default is the GPU if there is one, "cuda" if vram is given, or else "cpu".

    Returns: the plan; print it.
    Raises: ValueError: nothing fits, and the message says what would; a size or a count breaks its rule; or
        ranks have divided the weights.
    """
    videos = check_positive_int("videos", videos)
    residuals = check_positive_int("residuals", residuals, least=0)
    settings = None if quantize is None else Quantization.of(quantize)
    anonymous: dict[str, int] = {}
    copied: dict[str, int] = {}
    stored: dict[str, int] = {}
    if isinstance(target, Preset):
        preset, name, models, on_device = target, target.name, released_models(target), 0
    else:
        target.ranks.check_whole()
        target.any_transformer  # noqa: B018 - says if there is none
        target.check_vae("planning")
        preset, name, models = target.preset, target.checkpoint_name, meta_copies(target.components)
        anonymous, on_device = _held(target, models)
        copied, stored = _copied(target, models), _stored(target, models)
    given = {"width": width, "height": height, "num_frames": num_frames}
    w, h, t = (getattr(preset, n) if value is None else as_number(value) for n, value in given.items())
    kinds = (GUIDED if guided else UNGUIDED) if passes is None else tuple(passes)
    task = Task(name, models, (w, h, t), settings, kinds, videos, residuals, anonymous, copied, stored)
    check_size("width", w, task.cell[0])
    check_size("height", h, task.cell[1])
    check_num_frames(t, strides_of(models["vae"].config)[0])
    taken = {"cpu": sum(anonymous.values()), (card() or torch.device("cuda")).type: on_device}
    machine = Machine.of(vram, ram, disk, device, taken)
    if settings is not None:
        for slot in settings.slots(task.experts):
            if needs_quantizing(models[slot], settings.of_a_model):
                quantize_model(models[slot], settings.of_a_model)
                anonymous[slot], copied[slot], stored[slot] = bytes_of(models[slot]), 0, 0
    for found in _candidates(task, machine):
        if found.fits:
            return found
    raise ValueError(_what_would_fit(task, machine))


def _held(pipe: Any, models: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Return the bytes of each model's weights in host memory and no file, and of all weights on devices."""
    files, held, on_device = FileMappings(), {}, 0
    for name in models:
        model = getattr(pipe, name)
        weights = [*model.parameters(), *model.buffers(), *pipe.memory.host_weights(name)]
        # Where the system does not list mappings, weights are taken to be in files.
        held[name] = anonymous_bytes(weights, files) if files.files else 0
        moved = [w for w in weights if type(w) in (nn.Parameter, torch.Tensor) and w.device.type not in _HOST]
        on_device += sum({weight.data_ptr(): weight.nbytes for weight in moved}.values())
    return held, on_device


def _copied(pipe: Any, models: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of each model's weights in files of which running on the host makes copies.

    A pipeline without weights, or one whose weights are on a device, is taken to copy all of them.
    """
    copied = {}
    for name in models:
        model = getattr(pipe, name)
        if not any(p.is_meta or not p.is_cpu for p in model.parameters()):
            weights = [*unaligned_weights(model), *deferred_weights(model)]
            copied[name] = sum(weight.nbytes for weight in weights)
    return copied


def _stored(pipe: Any, models: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes in files of each model whose weights are converted on the way."""
    files, stored = FileMappings(), {}
    for name in models:
        weights = list(getattr(pipe, name).parameters())
        deferred = [weight for weight in weights if isinstance(weight, DeferredWeight)]
        if deferred:
            others = [w for w in weights if type(w) is nn.Parameter and w.is_cpu and w in files]
            stored[name] = sum(w.stored_bytes for w in deferred) + sum(w.nbytes for w in others)
    return stored


# ---- ways to make the video ----


def _candidates(task: Task, machine: Machine, leanest: bool = False) -> Iterator[Plan]:
    """Yield ways to make the video, the fastest first.

    Strips that would not make a way fit are left out; or, if only the `leanest` are asked for, all but the
    most strips.
    """
    ways_to_decode: tuple[int | None, ...] = (None,)
    if is_ours(task.models["vae"]):
        # Fewest strips first: each takes a little longer than the one before.
        ways_to_decode = STRIPS[-1:] if leanest else (None, *STRIPS)
    for placements, computing in _placements(task, machine):
        for strips in ways_to_decode:
            ways = [
                _planned(task, machine, placements | encoders, strips, computing)
                for encoders in _encoder_placements(task, machine, placements)
            ]
            yield from ways
            if not any(way.needs_strips for way in ways):
                break


def _placements(task: Task, machine: Machine) -> Iterator[tuple[dict[str, Placement], Computing]]:
    """Yield placements of all models, and how blocks compute; the fastest first."""
    stays, on_demand = Placement("resident" if machine.has_device else "host"), Placement("on_demand")
    moved = dict.fromkeys(task.models, on_demand)
    yield dict.fromkeys(task.models, stays), Computing()
    yield moved | dict.fromkeys(task.experts, stays), Computing()
    yield moved, Computing()
    ours = is_ours(task.models[task.experts[0]])
    for chunks in (1, CHUNKS_OF_TOKENS) if ours else (1,):
        for experts, in_turn in _streamed_experts(task, machine, chunks, ours and task.takes_turns):
            yield moved | experts, Computing(chunks, in_turn)


def _encoder_placements(
    task: Task, machine: Machine, placements: Mapping[str, Placement]
) -> Iterator[dict[str, Placement]]:
    """Yield placements of the encoders: as given, streamed block by block, beside a GPU on the host."""
    yield {name: placements[name] for name in task.encoders}
    if any(placements[name].kind == "on_demand" for name in task.encoders):
        streamed = Placement("streamed")
        yield {
            name: streamed if len(blocks_of(task.models[name])) > 2 else on_host(task.models[name])
            for name in task.encoders
        }
        if machine.has_device:
            yield dict.fromkeys(task.encoders, Placement("host"))


def _streamed_experts(
    task: Task, machine: Machine, chunks: int, several: bool
) -> Iterator[tuple[dict[str, Placement], bool]]:
    """Yield the placement of the transformers with the most resident blocks that fit, and whether in turn.

    The faster source is first; of each, all passes in turn, if there are `several`.
    """
    largest = task.largest_expert
    bytes_of = task.device_bytes if machine.has_device else task.scratch_bytes
    room = machine.vram - (WORKSPACE if machine.has_device else HOST_WORKSPACE)
    if not machine.has_device:
        room -= sum(map(task.held, task.models))
    sources: tuple[Source, ...] = ("pinned", "mmap") if machine.has_device else ("mmap",)
    for source, in_turn in itertools.product(sources, (True, False) if several else (False,)):
        left = room - task.denoise(chunks, in_turn)
        for resident in range(len(blocks_of(task.models[largest])), -1, -1):
            placement = Placement("streamed", resident_blocks=resident, source=source)
            if bytes_of(largest, placement) <= left or not resident:
                yield dict.fromkeys(task.experts, placement), in_turn
                break


# ---- what a way takes ----


def _planned(
    task: Task,
    machine: Machine,
    placements: Mapping[str, Placement],
    strips: int | None,
    computing: Computing,
) -> Plan:
    phases, prefetch = _phases(task, machine, placements, strips, computing)
    held = sum(_on_host(task, machine, name, placement) for name, placement in placements.items())
    packed = [name for name, placement in placements.items() if placement.source == "pinned"]
    pinned = sum(task.device_bytes(name, Placement("on_demand")) for name in packed)
    staged = machine.has_device and any(p.kind != "host" and p.source == "mmap" for p in placements.values())
    pinned += staged * CHUNKS * CHUNK_BYTES
    in_files = placements.keys() - packed
    return Plan(
        name=task.name,
        size=task.size,
        machine=machine,
        placements=placements,
        strips=strips,
        token_chunks=computing.chunks,
        in_turn=computing.in_turn,
        prefetch=prefetch,
        quantize=task.quantize,
        phases=phases,
        host=pinned + held + _passing(task, placements, strips)
        if machine.has_device
        else max(p.total for p in phases),
        pinned=pinned,
        mapped=sum(map(task.in_files, in_files)),
        step_seconds=_step_seconds(task, machine, placements, computing.in_turn),
        pin_seconds=_pin_seconds(task, machine, packed),
        step_flops=task.step_flops(),
        videos=task.videos,
        residuals=task.residuals,
        passes=task.step_passes,
    )


def _phases(
    task: Task,
    machine: Machine,
    placements: Mapping[str, Placement],
    strips: int | None,
    computing: Computing,
) -> tuple[tuple[Phase, ...], bool]:
    """Return a call's phases where its models run, and whether the second expert can be prefetched."""
    here = machine.has_device
    bytes_of = task.device_bytes if here else task.scratch_bytes
    moved = {name: bytes_of(name, p) for name, p in placements.items() if p.kind in ("on_demand", "streamed")}
    stay = sum(task.device_bytes(name, p) for name, p in placements.items() if p.kind == "resident")
    if not here:
        stay = sum(_on_host(task, machine, name, placement) for name, placement in placements.items())

    def weights(active: Iterable[str]) -> int:
        """Bytes while some models run one after another: those that stay, and the largest other one."""
        return stay + max((moved.get(name, 0) for name in active), default=0)

    workspace = WORKSPACE if here else HOST_WORKSPACE
    text = task.text(name for name in task.encoders if not here or placements[name].kind != "host")
    one, step = weights(task.experts), task.denoise(*computing) + workspace
    both = stay + sum(moved[name] for name in task.experts if placements[name].kind == "on_demand")
    prefetch = here and one < both and both + step <= machine.vram
    pixels, vae = 0 if here else task.pixels, weights(["vae"])
    phases = [
        Phase("text", weights(task.encoders), text),
        Phase("denoise", both if prefetch else one, step),
        Phase("decode", vae, task.decode(strips, here).device + workspace + pixels),
    ]
    if task.encoded_frames:
        phases.insert(1, Phase("encode", vae, task.encode(strips, here).device + workspace))
    return tuple(phases), prefetch


def _on_host(task: Task, machine: Machine, name: str, placement: Placement) -> int:
    """Return the bytes of a model's weights in the host's memory that are neither pinned nor in a file."""
    if placement.source == "pinned":
        return 0
    if placement.kind != "host":
        return task.held(name)
    if machine.has_device:
        return task.held(name) + task.scratch_bytes(name, placement)
    return task.host_bytes(name)


def _passing(task: Task, placements: Mapping[str, Placement], strips: int | None) -> int:
    """Return the bytes of host memory beside weights and staging buffers.

    They are the most of: videos, the VAE's histories, encoders that run there.
    """
    encoders = [name for name in task.encoders if placements[name].kind == "host"]
    text = task.text(encoders) + HOST_WORKSPACE if encoders else 0
    image = task.encode(strips, True).host if task.encoded_frames else 0
    return max(2 * task.pixels, task.pixels + task.decode(strips, True).host, image, text)


def _step_seconds(
    task: Task, machine: Machine, placements: Mapping[str, Placement], in_turn: bool
) -> float | None:
    """Return the longest of: computing, copying to the device, reading what the host has no room for."""
    if machine.flops is None:
        return None
    seconds, name = task.step_flops() / machine.flops, task.largest_expert
    placement, in_files = placements[name], task.in_files(name)
    if placement.kind == "streamed":
        share = 1 - placement.resident_blocks / len(blocks_of(task.models[name]))
        passed = share * task.model_runs(in_turn)
        if machine.bandwidth is not None:
            seconds = max(seconds, passed * task.bytes_of(name) / machine.bandwidth)
        if placement.source == "mmap" and machine.disk is not None and in_files > machine.ram:
            seconds = max(seconds, passed * in_files / machine.disk)
    return seconds


def _pin_seconds(task: Task, machine: Machine, packed: Iterable[str]) -> float | None:
    """Return the time to pin memory for models and to read their files into it, if their rate is known."""
    if machine.pinning is None:
        return None
    nbytes = sum(task.device_bytes(name, Placement("on_demand")) for name in packed)
    read = sum(map(task.in_files, packed)) / machine.disk if machine.disk is not None else 0.0
    return nbytes / machine.pinning + read


# ---- where nothing fits ----


def _what_would_fit(task: Task, machine: Machine) -> str:
    smallest = min(_candidates(task, machine, leanest=True), key=lambda p: p.device_peak)
    width, height, frames = task.size
    where = "device" if machine.has_device else "host"
    message = (
        f"{task.name} at {width}x{height} with {frames} frames does not fit into {machine}: it takes "
        f"at least {smallest.device_peak / GB:.2f} GB of the {where}"
    )
    if machine.has_device and smallest.host > machine.ram:
        message += f" and {smallest.host / GB:.2f} GB of the host"
    worst = max(smallest.phases, key=lambda phase: phase.total)
    weights, rest = worst.weights / GB, worst.activations / GB
    message += f" ({worst.name}: {weights:.2f} GB of weights, {rest:.2f} GB of the rest)"
    fitting = [size for size in _smaller_sizes(task) if _fits(task.resized(size), machine)]
    if fitting:
        return message + "; " + " or ".join(f"{w}x{h} with {f} frames" for w, h, f in fitting) + " would fit"
    if (
        sum(map(task.held, task.models)) > machine.ram
    ):  # of models that are in no file, such as quantised ones
        return f"{message}; weights in files, as prepare= leaves them, need not stay in memory"
    helps = task.quantize is None and worst.name == "denoise"
    return message + ('; quantize="fp8" takes less' if helps else "; a smaller size takes less")


def _fits(task: Task, machine: Machine) -> bool:
    return any(found.fits for found in _candidates(task, machine))


def _smaller_sizes(task: Task) -> Iterator[tuple[int, int, int]]:
    """Yield a video of half the frames, and one of about 480 rows."""
    (width, height, frames), cell = task.size, task.cell
    stride, _ = strides_of(task.models["vae"].config)
    half = 1 + (frames - 1) // (2 * stride) * stride
    if half < frames:
        yield width, height, half
    scale = 480 / min(width, height)
    if scale < 1:
        smaller = [round(n * scale / c) * c for n, c in zip((width, height), cell, strict=True)]
        yield smaller[0], smaller[1], frames
