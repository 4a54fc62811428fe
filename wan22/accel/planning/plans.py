"""Plans: where each model is kept, how videos are decoded, and the memory and time that takes."""

import html
from collections.abc import Mapping
from dataclasses import dataclass

from ..offload.layout import Placement
from ..quantization.settings import Quantization
from .machine import GB, Machine
from .passes import GUIDED, Passes


@dataclass(frozen=True)
class Phase:
    """A part of a call, and the most bytes it takes on the device.

    `name` is "text", "encode" (of an image by the VAE), "denoise" or "decode".
    """

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class Plan:
    """A way to make videos, and what it takes; `pipe.apply(plan)` carries it out.

    Args:
        name: the checkpoint's name.
        size: width, height and frames.
        machine: the machine with its budget.
        placements: placements of the models, by component name.
        strips: number of strips that the VAE encodes and decodes in; None: whole frames.
        token_chunks: number of parts of the tokens that blocks compute one after the other.
        in_turn: whether each block computes all passes of all videos, before the next one's weights come.
        prefetch: whether the second expert is loaded while the first one still runs.
        quantize: how the transformers are quantised.
        phases: those of a call, in order; "encode" only where an image conditions the video.
        host: bytes of host memory: weights that are in no file or are copied there, staging buffers, and
            videos or what decoding in strips keeps there.
        pinned: bytes of these that are pinned, for copies to the device.
        mapped: bytes of weights in files, whose pages the system can drop.
        step_seconds: time of one step, all passes of all videos; None: rates are unknown.
        pin_seconds: time that the first call takes to bring weights to pinned memory, beside its steps; None:
            rates are unknown.
        step_flops: floating-point operations of one step; 0: not counted.
        videos: number of videos of a call.
        residuals: tensors of the tokens' size that a step cache keeps of each pass and video.
        passes: of each video, in the step that takes the most.
    """

    name: str
    size: tuple[int, int, int]
    machine: Machine
    placements: Mapping[str, Placement]
    strips: int | None
    token_chunks: int
    in_turn: bool
    prefetch: bool
    quantize: Quantization | None
    phases: tuple[Phase, ...]
    host: int
    pinned: int
    mapped: int
    step_seconds: float | None = None
    pin_seconds: float | None = None
    step_flops: float = 0.0
    videos: int = 1
    residuals: int = 0
    passes: Passes = GUIDED

    @property
    def device_peak(self) -> int:
        """Most bytes on the device."""
        return max(phase.total for phase in self.phases)

    @property
    def pixels(self) -> int:
        """Pixels of a video, in all frames."""
        width, height, frames = self.size
        return width * height * frames

    @property
    def fits(self) -> bool:
        """Whether device and host have enough memory."""
        return self.device_peak <= self.machine.vram and self.host <= self.machine.ram

    @property
    def needs_strips(self) -> bool:
        """Whether all phases have enough memory but those of the VAE, for which more strips take less."""
        short = {phase.name for phase in self.phases if phase.total > self.machine.vram}
        return bool(short) and short <= {"encode", "decode"}

    def _repr_html_(self) -> str:
        """Return the plan for notebooks, in the columns that it is printed in."""
        return f'<pre style="line-height: 1.2">{html.escape(str(self))}</pre>'

    def __str__(self) -> str:
        width, height, frames = self.size
        many = f", {self.videos} videos" if self.videos > 1 else ""
        lines = [f"{self.name}, {width}x{height}, {frames} frames{many}, on {self.machine}", ""]
        on_cpu = not self.machine.has_device
        lines += [f"  {name:14} {_described(p, on_cpu)}" for name, p in self.placements.items()]
        decoding = "whole frames" if self.strips is None else f"{self.strips} strips, exact"
        lines += [f"  {'decoding':14} {decoding}"]
        ways = ["each block for all passes at once"] if self.in_turn else []
        ways += [f"tokens in {self.token_chunks} parts"] if self.token_chunks > 1 else []
        if ways:
            lines += [f"  {'denoising':14} {', '.join(ways)}, exact"]
        if self.quantize:
            lines += [f"  {'quantised':14} {self.quantize}, which changes the result"]
        lines += ["", f"  {'phase':14} {'weights':>10} {'the rest':>10} {'in all':>10}"]
        lines += [
            f"  {p.name:14} {p.weights / GB:7.2f} GB {p.activations / GB:7.2f} GB {p.total / GB:7.2f} GB"
            for p in self.phases
        ]
        where = "device" if self.machine.has_device else "host"
        lines += ["", f"  {where} peak {self.device_peak / GB:.2f} of {self.machine.vram / GB:.2f} GB"]
        if self.machine.has_device:
            lines += [f"  host {self.host / GB:.2f} of {self.machine.ram / GB:.2f} GB"]
            lines[-1] += f", {self.pinned / GB:.2f} GB of it pinned" if self.pinned else ""
        if self.mapped:
            lines[-1] += f", and {self.mapped / GB:.2f} GB in files, read as there is room"
        if self.step_seconds is not None:
            lines += [f"  about {self.step_seconds:.3g} s a step"]
            if self.pin_seconds:
                lines[-1] += f", and once {self.pin_seconds:.3g} s to pin the weights"
        return "\n".join(lines)


def _described(placement: Placement, on_cpu: bool) -> str:
    where = "in memory" if on_cpu else "on the device"
    if placement.kind != "streamed":
        return {
            "resident": f"stays {where}",
            "on_demand": f"{where} for its calls",
            "host": "where it is" if on_cpu else "on the host, block by block",
        }[placement.kind]
    source = "pinned memory" if placement.source == "pinned" else "its file"
    resident, buffers = placement.resident_blocks, placement.buffers
    return f"{resident} blocks stay, the others stream from {source}, {buffers} at a time"
