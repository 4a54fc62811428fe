"""Everything that can be checked before weights are downloaded or loaded."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accel.parallel.environment import is_first
from ..checks import shown
from ..pictures import is_url
from .loading import find_device, lora_arguments, parse_layout, parse_memory, quantization_of
from .options import Loading, Saving, Target, flags_of
from .outline import Settings, outlined, settings_of
from .saving import sheet_of


@dataclass(frozen=True)
class Outline:
    """What a command would make, and with what."""

    pipe: Any  # without weights
    settings: Settings


def check_output(path: Path, count: int, target: Target, saving: Saving) -> None:
    """Refuse a file that could not be written, or that is there; no library is loaded for it."""
    from ..video import writers

    writers.check_ending(path)
    writers.check_quality(path, saving.quality, saving.crf)
    if not is_first():
        return
    check_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file's name")
    writers.numbered(path, count, target.overwrite)
    sheet = sheet_of(path)
    if saving.contact_sheet and sheet.exists() and not target.overwrite:
        raise FileExistsError(f"{sheet} exists; overwrite=True replaces it")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is none, or nobody can write to; one that is not there is made later."""
    here = existing(folder)
    if not here.is_dir():
        raise NotADirectoryError(f"{here} is a file, not a folder")
    if not os.access(here, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written to the folder {here.absolute()}")


def existing(folder: Path) -> Path:
    """Return the folder, or the first one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_call(call: Mapping[str, Any]) -> None:
    """Refuse arguments of a call that are wrong for every checkpoint; no library is loaded for it."""
    for name in ("preview_every", "preview_decoder"):
        if name in call and "preview" not in call:
            raise ValueError(f"{flags_of(name)[0]} needs --preview FILE")
    for name in ("image", "last_image"):
        image = call.get(name)
        if image is not None and not is_url(image) and not Path(image).expanduser().is_file():
            raise FileNotFoundError(f"there is no file {image}")


def check_loading(task: str, loading: Loading, dry: bool = False, pipe: Any = None) -> Any:
    """Check how a pipeline is to be loaded and set up; return it without weights, None if nothing here tells.

    `dry`: nothing is made, perhaps because this is not the machine to make it on. `pipe` is the pipeline
    without weights, if there is one already.
    """
    memory = parse_memory(loading.memory)
    parse_layout(loading.parallel)
    device = find_device(loading.device)
    if memory not in (None, "auto") and device == "cpu" and not dry:
        raise ValueError(
            f"memory={shown(memory)} is a GPU's, and there is no CUDA device here; "
            "memory='auto' plans for the CPU"
        )
    quantization_of(loading)
    pipe = outlined(task, loading) if pipe is None else pipe
    if pipe is None:
        return None
    _check_kernel(pipe, loading.attention_backend, device)
    for lora in lora_arguments(loading):
        if not any(isinstance(place, str) and _is_remote(place) for place in lora.values()):
            pipe.loras.check_lora(**lora)
    return pipe


def check_all(
    task: str, call: Mapping[str, Any], loading: Loading, path: Path, dry: bool, pipe: Any = None
) -> Outline | None:
    """Check what needs the library, but no weights; return what would be made, None if nothing here tells.

    For `dry` and `pipe` see `check_loading`.
    """
    if (pipe := check_loading(task, loading, dry, pipe)) is None:
        return None
    settings = settings_of(pipe, call)
    check_room(path, settings)
    if not dry:
        _check_attention(pipe, call, loading.device)
    if loading.memory is not None and not dry:
        plan_of(pipe, settings, loading)
    return Outline(pipe, settings)


def _is_remote(place: str) -> bool:
    """Return whether a LoRA would have to be downloaded to be checked."""
    from ..checkpoints.files.hub import hub_file, is_repository_name

    here = Path(place).expanduser().exists()
    return not here and (hub_file(place) is not None or is_repository_name(place))


def _check_kernel(pipe: Any, name: str | None, device: str) -> None:
    """Refuse an attention kernel that cannot run here."""
    from ..accel.attention import select
    from ..checkpoints.loading.attention_names import our_name

    if name is not None:
        model = pipe.any_transformer
        select(our_name(name), device, model.dtype, model.head_dim)


def _check_attention(pipe: Any, call: Mapping[str, Any], device: str | None) -> None:
    """Refuse sparse self-attention that cannot run here."""
    import torch

    from ..accel.sparse.settings import sparse_attention_of

    if (attention := sparse_attention_of(call.get("attention"))) is not None:
        model = pipe.any_transformer
        attention.check_device(torch.device(find_device(device)), model.dtype, model.head_dim)


def plan_of(pipe: Any, settings: Settings, loading: Loading) -> Any:
    """Return the plan of a call; a ValueError says that nothing fits, and what would."""
    from ..accel.planning.planner import plan

    memory = parse_memory(loading.memory)
    vram = None if memory == "auto" else memory
    names = ("height", "width", "num_frames", "videos", "residuals")
    size = {name: getattr(settings, name) for name in names}
    device = None if vram is not None else loading.device
    passes = settings.kinds
    return plan(pipe, **size, vram=vram, quantize=quantization_of(loading), passes=passes, device=device)


def check_room(path: Path, settings: Settings) -> None:
    """Refuse a disk without room for the video: all of an .npy, at least a hundredth of the pixels else."""
    values = 3 * settings.width * settings.height * settings.num_frames * settings.videos
    need = 4 * values if path.suffix.lower() == ".npy" else values // 100
    free = shutil.disk_usage(existing(path.parent)).free
    if free < need:
        raise OSError(f"{path} takes about {need / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB left")
