"""Wan 2.1 and 2.2 video models: pipelines, models and schedulers, compatible with the Diffusers hub."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Subpackages with names of their own, imported when first used, too.
_SUBPACKAGES = ("accel", "checkpoints", "guidance", "presets", "prompts", "training")
# Where each public name lives. They are imported when first used, so that `import wan22` costs nothing.
_EXPORTS = {
    "AutoencoderKLWan": "wan22.checkpoints.loading.models",
    "CacheRatios": "wan22.pipelines.call.caches.ratios",
    "EasyCache": "wan22.pipelines.call.caches.settings",
    "FewSteps": "wan22.few_steps",
    "FlowMatchDPMSolverScheduler": "wan22.schedulers.dpmpp",
    "FlowMatchEulerScheduler": "wan22.schedulers.euler",
    "FlowMatchUniPCScheduler": "wan22.schedulers.unipc",
    "MagCache": "wan22.pipelines.call.caches.settings",
    "Phase": "wan22.few_steps",
    "Preview": "wan22.pipelines.call.preview",
    "Quantization": "wan22.accel.quantization.settings",
    "RadialAttention": "wan22.accel.sparse.settings",
    "SpargeAttention": "wan22.accel.sparse.settings",
    "TaylorCache": "wan22.pipelines.call.caches.settings",
    "WanI2VPipeline": "wan22.pipelines.i2v",
    "WanT2VPipeline": "wan22.pipelines.t2v",
    "WanTransformer3DModel": "wan22.checkpoints.loading.models",
    "WanVideo": "wan22.video.result",
    "grid": "wan22.video.grid",
    "read_recipe": "wan22.video.metadata",
    "tiny_checkpoint": "wan22.assets",
}

__all__ = [  # noqa: RUF022 (grouped by use)
    "WanT2VPipeline",
    "WanI2VPipeline",
    "WanVideo",
    "Preview",
    "EasyCache",
    "MagCache",
    "TaylorCache",
    "CacheRatios",
    "Quantization",
    "RadialAttention",
    "SpargeAttention",
    "grid",
    "WanTransformer3DModel",
    "AutoencoderKLWan",
    "FlowMatchUniPCScheduler",
    "FlowMatchDPMSolverScheduler",
    "FlowMatchEulerScheduler",
    "FewSteps",
    "Phase",
    "read_recipe",
    "tiny_checkpoint",
]

if TYPE_CHECKING:
    from wan22 import accel, checkpoints, guidance, presets, prompts, training  # noqa: F401 (after `import wan22`)
    from wan22.accel.quantization.settings import Quantization
    from wan22.accel.sparse.settings import RadialAttention, SpargeAttention
    from wan22.assets import tiny_checkpoint
    from wan22.checkpoints.loading.models import AutoencoderKLWan, WanTransformer3DModel
    from wan22.few_steps import FewSteps, Phase
    from wan22.pipelines.call.caches.ratios import CacheRatios
    from wan22.pipelines.call.caches.settings import EasyCache, MagCache, TaylorCache
    from wan22.pipelines.call.preview import Preview
    from wan22.pipelines.i2v import WanI2VPipeline
    from wan22.pipelines.t2v import WanT2VPipeline
    from wan22.schedulers.dpmpp import FlowMatchDPMSolverScheduler
    from wan22.schedulers.euler import FlowMatchEulerScheduler
    from wan22.schedulers.unipc import FlowMatchUniPCScheduler
    from wan22.video.grid import grid
    from wan22.video.metadata import read_recipe
    from wan22.video.result import WanVideo


def __getattr__(name: str) -> Any:
    import_module(
        "wan22.progress"
    )  # before diffusers, whose import of tqdm warns in notebooks without widgets
    if name in _SUBPACKAGES:
        return import_module(f"wan22.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'wan22' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
