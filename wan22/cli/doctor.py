"""`wan22 doctor`: what this machine has, and what is recommended on it."""

import json
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .checking import existing
from .options import Output
from .reporting import aligned, print_lines, say

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "peft")
GB = 1e9
# GPU memory from which a checkpoint is at ease; by arithmetic, see the README's table.
_ADVICE = (
    (75, "Wan2.2-T2V-A14B or Wan2.2-I2V-A14B with --dtype bf16: all models stay on the GPU"),
    (16, "Wan2.2-T2V-A14B or Wan2.2-I2V-A14B with --dtype bf16 --memory auto; Wan2.2-TI2V-5B is faster"),
    (6, "Wan2.2-TI2V-5B with --dtype bf16 --memory auto; Wan2.2-T2V-A14B at 832x480"),
    (0, "Wan2.1-T2V-1.3B with --dtype bf16 --memory auto"),
)


def print_findings(output: Output) -> None:
    """Print what there is, as a table or as JSON."""
    say("looking at this machine")
    found = findings()
    if output.as_json:
        print(json.dumps(found))
    else:
        print_lines(aligned((name, _in_words(value)) for name, value in found.items()))


def findings() -> dict[str, Any]:
    """Return versions, devices, kernels, ffmpeg, memory, disks, and what is recommended."""
    import torch
    from huggingface_hub import constants

    from .. import __version__
    from ..checkpoints.preparing.cache import cache_folder
    from ..devices import card, module_of
    from ..host_memory import available_ram
    from .loading import find_device

    device = find_device(None)
    kind = card()
    module = None if kind is None else module_of(kind)
    gpus = [] if module is None else [module.get_device_properties(i) for i in range(module.device_count())]
    return {
        "wan22": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device,
        "gpus": [f"{gpu.name}, {gpu.total_memory / GB:.3g} GB" for gpu in gpus],
        "cuda": torch.version.cuda,
        "attention": _kernels(device),
        "ffmpeg": _ffmpeg(),
        "memory": f"{available_ram() / GB:.3g} GB are free",
        "downloads": _room(Path(constants.HF_HUB_CACHE)),
        "prepared models": _room(cache_folder()),
        "hub": "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT,
        "recommended": _advice(device, [gpu.total_memory / GB for gpu in gpus]),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernels(device: str) -> dict[str, str]:
    """Return of each attention kernel whether it can run, or why not."""
    from ..accel.attention import available

    return {name: reason or "can run" for name, reason in available(device).items()}


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return f"{imageio_ffmpeg.get_ffmpeg_version()}, {imageio_ffmpeg.get_ffmpeg_exe()}"
    except (RuntimeError, OSError) as error:
        return f"cannot be run, so that no .mp4 can be written: {error}"


def _room(folder: Path) -> str:
    return f"{folder}, where {shutil.disk_usage(existing(folder)).free / GB:.3g} GB are free"


def _advice(device: str, gigabytes: list[float]) -> str:
    if not gigabytes:
        slow = "the miniature (no --model) for a try; a real checkpoint takes hours on a CPU"
        return slow if device == "cpu" else f"{_ADVICE[-1][1].replace(' --memory auto', '')} on {device}"
    return next(advice for least, advice in _ADVICE if min(gigabytes) >= least)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return aligned((name, "not installed" if entry is None else entry) for name, entry in value.items())
    if isinstance(value, list):
        return "\n".join(value) or "none that PyTorch can use"
    return "none" if value is None else str(value)
