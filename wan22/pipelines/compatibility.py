"""What scripts and callbacks written for diffusers' pipelines read."""

from typing import Any

from ..video.progress import progress_bar
from ..video.recipe import Recipe


class CompatiblePipeline:
    """The properties of diffusers' Wan pipelines, and its progress bar."""

    vae: Any
    _recipe: Recipe | None = None  # of the running or last call
    _guided = False
    _interrupt = False
    _current_timestep: Any = None

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames per latent frame."""
        return self.vae.temporal_stride

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels per latent row and column."""
        return self.vae.spatial_stride

    @property
    def guidance_scale(self) -> float | None:
        """Guidance of the running or last call, of the high-noise expert."""
        return self._recipe.guidance_scale if self._recipe else None

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any step of the running or last call is guided."""
        return self._guided

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by setting `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the running or last call."""
        return self._recipe.num_inference_steps if self._recipe else 0

    @property
    def current_timestep(self) -> Any:
        """Timestep of the running step; None outside a call."""
        return self._current_timestep

    def progress_bar(self, iterable: Any = None, total: int | None = None, **options: Any) -> Any:
        """Return a progress bar with the settings of `set_progress_bar_config`."""
        settings = getattr(self, "_progress_bar_config", {})
        return progress_bar(iterable, total, **options | settings)
