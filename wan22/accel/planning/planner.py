"""What fits: the fastest way to make a video within a budget of memory, without changing the result.

Times are the slower one of arithmetic and copies, at rates measured on the machine.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...presets import Preset
from ..offload.layout import Placement, blocks_of
from ..quantize import is_quantized
from ..quantize import quantize as quantize_model
from .costs import Task
from .machine import GB, Machine
from .plans import Phase, Plan
from .skeletons import outline, released_models

# Strips that a video is decoded in, fewest first: each takes longer than the one before.
STRIPS = (None, 2, 4)
# What the libraries underneath take for themselves: on a device the workspaces of cuBLAS; on the host the
# buffers of BLAS and oneDNN, and what the allocator does not give back (0.15 to 0.2 GB, measured).
WORKSPACE, HOST_WORKSPACE = 64 * 2**20, 160 * 2**20


def plan(
    target: Any,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    vram: str | float | None = None,
    ram: str | float | None = None,
    disk: str | float | None = None,
    *,
    quantize: str | None = None,
    guided: bool = True,
    device: str | torch.device | None = None,
) -> Plan:
    """Find the fastest way to make a video that fits, without changing the result.

    Args:
        target: a pipeline, or a preset of `wan22.presets` (its bf16 checkpoint then).
        height: pixels; default is the checkpoint's own.
        width: likewise.
        num_frames: likewise.
        vram: memory of the device, "12GB" (1e9 bytes each), "11.5GiB", or bytes; default is what is free.
        ram: memory of the host, likewise.
        disk: bytes a second that weights are read with where the host's memory is short of them.
        quantize: "fp8", "int8" or "fp8_dynamic", to plan for quantised transformers: that changes the result.
        guided: whether steps have two passes.
        device: default is "cuda" if there is one or vram is given, or else "cpu".

    Returns: the plan; print it.

    Raises:
        ValueError: nothing fits; the message says what would.
    """
    preset = target if isinstance(target, Preset) else target.preset
    models = released_models(preset) if isinstance(target, Preset) else outline(target.components)
    size = (width or preset.width, height or preset.height, num_frames or preset.num_frames)
    name = preset.name if isinstance(target, Preset) else target.checkpoint_name
    machine = Machine.of(vram, ram, disk, device)
    task = Task(name, models, size, quantize, guided)
    if quantize:
        for slot in task.experts:
            if not is_quantized(task.models[slot]):
                quantize_model(task.models[slot], quantize)
    for found in _candidates(task, machine):
        if found.fits:
            return found
    raise ValueError(_what_would_fit(task, machine))


def _candidates(task: Task, machine: Machine) -> Iterator[Plan]:
    """Yield ways to make the video, fastest first; of those that cannot fit, only the smallest."""
    if not machine.has_device:
        yield _planned(task, machine, dict.fromkeys(task.models, Placement("host")), None, True)
        return
    resident = dict.fromkeys(task.models, Placement("resident"))
    visiting = dict.fromkeys(task.models, Placement("visiting"))
    experts = {name: Placement("resident") for name in task.experts}
    for placements in (resident, visiting | experts, visiting):
        for strips in STRIPS:
            for encoders in _encoder_placements(task, machine, placements):
                yield _planned(task, machine, placements | encoders, strips, True)
    for keep in (True, False):
        for experts in _streaming(task, machine, keep):
            for strips in STRIPS:
                for encoders in _encoder_placements(task, machine, visiting):
                    yield _planned(task, machine, visiting | encoders | experts, strips, keep)


def _encoder_placements(
    task: Task, machine: Machine, placements: Mapping[str, Placement]
) -> Iterator[dict[str, Placement]]:
    """Yield placements of the encoders: as given, in a stream of blocks, on the host."""
    yield {name: placements[name] for name in task.encoders}
    if any(placements[name].kind == "visiting" for name in task.encoders):
        yield {
            name: Placement("streamed") if len(blocks_of(task.models[name])) > 2 else Placement("host")
            for name in task.encoders
        }
        yield {name: Placement("host") for name in task.encoders}


def _streaming(task: Task, machine: Machine, keep: bool) -> Iterator[dict[str, Placement]]:
    """Yield the placement of the transformers with the most resident blocks that fit, from faster homes."""
    first = task.experts[0]
    room = machine.vram - task.denoise(keep) - WORKSPACE
    pinned = sum(task.bytes_of(name) for name in task.experts)
    home = "pinned" if pinned + 2 * task.pixels <= machine.ram else "mapped"
    for resident in range(len(blocks_of(task.models[first])), -1, -1):
        placement = Placement("streamed", resident_blocks=resident, home=home)  # type: ignore[arg-type]
        if task.device_bytes(first, placement) <= room or not resident:
            yield dict.fromkeys(task.experts, placement)
            return


def _planned(
    task: Task, machine: Machine, placements: dict[str, Placement], strips: int | None, keep: bool
) -> Plan:
    """Work out what a way to make the video takes."""
    held = {name: task.device_bytes(name, placements[name]) for name in task.models}

    stay = {name for name in held if placements[name].kind == "resident"}
    always = sum(held[name] for name in stay)

    def weights(active: Iterable[str]) -> int:
        """Bytes on the device while some models run, one after another: what is resident, and the largest."""
        return always + max((held[name] for name in active if name not in stay), default=0)

    on_host = {name for name in task.encoders if placements[name].kind == "host" and machine.has_device}
    text = 0 if on_host == set(task.encoders) else task.text()
    workspace = WORKSPACE if machine.has_device else HOST_WORKSPACE
    step = task.denoise(keep) + workspace
    coming = sum(held[name] for name in task.experts if placements[name].kind == "visiting")
    prefetch = weights(task.experts) < always + coming and always + coming + step <= machine.vram
    phases: tuple[Phase, ...] = (
        Phase("text", weights(task.encoders), text),
        Phase("denoise", always + coming if prefetch else weights(task.experts), step),
        Phase("decode", weights(["vae"]), task.decode(strips) + workspace),
    )
    pinned = sum(task.bytes_of(name) for name, p in placements.items() if p.home == "pinned")
    everything = sum(map(task.bytes_of, task.models))
    host = pinned + 2 * task.pixels
    if not machine.has_device:
        # Everything lies in the host's memory once it has been used; what is in files comes and goes.
        phases = tuple(Phase(p.name, everything, p.activations) for p in phases)
        host = max(phase.total for phase in phases)
    return Plan(
        name=task.name,
        size=task.size,
        machine=machine,
        placements=placements,
        strips=strips,
        keep=keep,
        prefetch=prefetch,
        quantize=task.quantize,
        phases=phases,
        host=host,
        mapped=everything - pinned,
        step_seconds=_step_seconds(task, machine, placements),
    )


def _step_seconds(task: Task, machine: Machine, placements: Mapping[str, Placement]) -> float | None:
    """Return the slower one of a step's arithmetic and its copies."""
    if machine.flops is None:
        return None
    seconds = task.step_flops() / machine.flops
    name = task.experts[0]
    placement = placements[name]
    if placement.kind == "streamed" and machine.bandwidth is not None:
        total = task.bytes_of(name)
        share = 1 - placement.resident_blocks / len(blocks_of(task.models[name]))
        rate = machine.bandwidth
        if placement.home == "mapped" and machine.disk is not None and total > machine.ram:
            rate = min(rate, machine.disk)
        seconds = max(seconds, (1 + task.guided) * share * total / rate)
    return seconds


def _what_would_fit(task: Task, machine: Machine) -> str:
    """Say how much the smallest way takes, and which other videos would fit."""
    smallest = min(_candidates(task, machine), key=lambda p: p.device_peak)
    width, height, frames = task.size
    message = (
        f"{task.name} at {width}x{height} with {frames} frames does not fit into {machine}: it takes "
        f"at least {smallest.device_peak / GB:.2f} GB "
        + ("of the device" if machine.has_device else "of the host")
    )
    if machine.has_device and smallest.host > machine.ram:
        message += f" and {smallest.host / GB:.2f} GB of the host"
    worst = max(smallest.phases, key=lambda phase: phase.total)
    weights, rest = worst.weights / GB, worst.activations / GB
    message += f" ({worst.name}: {weights:.2f} GB of weights, {rest:.2f} GB of the rest)"
    fitting = [size for size in _smaller_sizes(task) if _fits(task.resized(size), machine)]
    if fitting:
        return message + "; " + " or ".join(f"{w}x{h} with {f} frames" for w, h, f in fitting) + " would fit"
    return message + (
        '; quantize="fp8" takes less' if task.quantize is None else "; a smaller size takes less"
    )


def _fits(task: Task, machine: Machine) -> bool:
    return any(found.fits for found in _candidates(task, machine))


def _smaller_sizes(task: Task) -> Iterator[tuple[int, int, int]]:
    """Yield a video of half the frames, and one of about 480 rows."""
    (width, height, frames), vae, cell = task.size, task.models["vae"], task.cell
    half = 1 + (frames - 1) // (2 * vae.temporal_stride) * vae.temporal_stride
    if half < frames:
        yield width, height, half
    scale = 480 / min(width, height)
    if scale < 1:
        smaller = [round(n * scale / c) * c for n, c in zip((width, height), cell, strict=True)]
        yield smaller[0], smaller[1], frames
