"""A pipeline in a few lines: the classes that are loaded, their dtypes, and what is attached to them."""

from collections import Counter
from typing import Any

from torch import nn

from ...accel.offload.offloader import was_freed
from ...checks import cut
from ...private_apis import uncompiled
from ...video.recipe import as_words
from .provenance import scheduler_settings

_SHIFTS = ("shift", "flow_shift")


def title(pipe: Any) -> str:
    """Return the pipeline's class and its checkpoint."""
    return f"{type(pipe).__name__} of {cut(pipe.checkpoint_name)}"


def rows(pipe: Any) -> list[tuple[str, str]]:
    """Return a name and a text for each component that there is, and for what changes how it runs."""
    found = [(name, component(part)) for name, part in pipe.components.items() if part is not None]
    absent = [name for name, part in pipe.components.items() if part is None]
    if absent:
        found.append(("not loaded", ", ".join(absent)))
    if pipe.config.boundary_ratio is not None:
        found.append(("boundary_ratio", f"{pipe.config.boundary_ratio:g}"))
    if (place := pipe.config.get("_name_or_path")) and place != pipe.checkpoint_name:
        found.append(("from", cut(place)))
    found.append(("device", pipe.provenance.device_description()))
    if loras := [_lora(lora.name, lora.strengths, pipe) for lora in pipe.provenance.used_loras()]:
        found.append(("LoRAs", ", ".join(loras)))
    if (plan := pipe.memory_plan) is not None:
        width, height, frames = plan.size
        found.append(("memory", f"planned for {width}x{height}, {frames} frames; see pipe.memory_plan"))
    elif pipe.memory.has_plan:
        found.append(("memory", "planned by the next call, for its size"))
    changes = pipe.acceleration.changes()
    return found + [(name, cut(as_words(value))) for name, value in changes.items()]


def component(part: Any) -> str:
    """Return a component's class; of a model also its dtypes and size, of a scheduler its shift."""
    kind = type(uncompiled(part)).__name__
    if isinstance(part, nn.Module):
        if was_freed(part):
            return f"{kind}, freed"
        tensors = {id(t): t for t in (*part.parameters(), *part.buffers())}.values()
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        dtypes = [name for name, size in sizes.most_common() if size * 100 >= sizes.total()]
        amount = f"{sizes.total() / 1e9:.1f} GB" if sizes.total() >= 1e9 else f"{sizes.total() / 1e6:.3g} MB"
        return f"{kind}, {' and '.join(dtypes)}, {amount}"
    if hasattr(part, "config") and hasattr(part, "set_timesteps"):
        settings = scheduler_settings(part)
        shift = next((settings[name] for name in _SHIFTS if settings.get(name) is not None), None)
        return kind if shift is None else f"{kind}, shift {shift:g}"
    return kind


def _lora(name: str, strengths: Any, pipe: Any) -> str:
    values = list(dict.fromkeys(strengths.values()))
    told = "/".join(f"{v:g}" if isinstance(v, int | float) else "by layer" for v in values)
    return f"{cut(name)} {told}{', fused' if name in pipe.fused_loras else ''}"
