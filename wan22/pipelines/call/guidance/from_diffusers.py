"""Guiders of diffusers, as far as they work with predictions alone."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....checks import check_choice, cut, shown
from ....private_apis import predictions_of_guider
from ..experts import Step
from .guider import GUIDED, UNGUIDED, Guider, Memory, PassSettings, Predictions

_SMALL = 1, 2, 2, 2, 2  # a video "1 c t h w"
_BOTH = ["pred_cond", "pred_uncond"]


@dataclass(frozen=True, eq=False)
class DiffusersGuider(Guider):
    """A guider of `diffusers.guiders`, with its own scale, start and stop.

    The object is used as its configuration describes it, and stays as it is: each video of a call has a copy.
    """

    name = "diffusers"

    guider: Any

    def __post_init__(self) -> None:
        from diffusers.guiders import BaseGuidance

        kind = type(self.guider)
        if (
            predictions_of_guider(self.guider) != _BOTH
            or kind.prepare_models is not BaseGuidance.prepare_models
        ):
            raise ValueError(
                f"{kind.__name__} changes the transformer between passes; of diffusers' guiders those work "
                "here that need two predictions alone, and wan22.guidance.SkipLayer skips layers"
            )
        changed = [name for name, value in self.config.items() if getattr(self.guider, name, value) != value]
        changed += [] if self.guider.get_state()["enabled"] == self.config["enabled"] else ["enabled"]
        if changed:
            raise ValueError(
                f"{changed[0]} of the {kind.__name__} has been changed, which its configuration does not "
                f"say; make another one by guider.new({cut(changed[0])}=…)"
            )
        _check_on_a_video(self.guider)

    @property
    def config(self) -> dict[str, Any]:
        """The guider's arguments."""
        return {name: value for name, value in self.guider.config.items() if not name.startswith("_")}

    @property
    def own_scale(self) -> float:
        """The guider's scale, as plain guidance counts: 1 is none."""
        scales = self.config.get("guidance_scales") or [self.config["guidance_scale"]]
        highest = max(scales) if isinstance(scales, list | tuple) else scales
        return float(highest) + bool(self.config.get("use_original_formulation"))

    @property
    def of_the_library(self) -> bool:
        """Whether its class is one that diffusers has, so that a recipe can name it."""
        return type(self.guider).__module__.startswith("diffusers.")

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return those that the guider asks for."""
        if scale == 1:
            return UNGUIDED
        return GUIDED if _at(copy.copy(self.guider), step).num_conditions == 2 else UNGUIDED

    def combine(self, predicted: Predictions, scale: float, step: Step, memory: Memory) -> torch.Tensor:
        """Return the guider's prediction."""
        cond = predicted["cond"]
        if scale == 1:
            return cond
        data = {"noise_pred": (cond, predicted.get("uncond", cond))}
        if "guider" not in memory:
            memory["guider"] = _begun(self.guider, data, step.count, step.timestep)
        guider = _at(memory["guider"], step)
        return guider(guider.prepare_inputs(data)).pred.float()


def _at(guider: Any, step: Step) -> Any:
    guider.set_state(step.index, step.count, step.timestep)
    return guider


def _begun(guider: Any, data: dict[str, Any], count: int, timestep: torch.Tensor) -> Any:
    """Return a copy of a guider that has kept nothing yet: what it keeps between steps it makes at step 0."""
    guider = copy.copy(guider)
    guider.set_state(0, count, timestep)
    guider.prepare_inputs(data)
    return guider


def _check_on_a_video(guider: Any) -> None:
    """Refuse a guider whose arithmetic is for images alone."""
    count, timestep = 10, torch.tensor(500.0)
    data = {"noise_pred": (torch.ones(_SMALL), torch.zeros(_SMALL))}
    try:
        for index in range(count):
            begun = _begun(guider, data, count, timestep)
            begun.set_state(index, count, timestep)
            begun(begun.prepare_inputs(data))
    except RuntimeError as error:
        raise ValueError(f"{type(guider).__name__} fails on videos: {cut(error)}") from error


def guider_of_diffusers(name: Any, config: Any) -> DiffusersGuider:
    """Return the guider that a recipe describes; refuse a class that diffusers does not have by name."""
    from diffusers import guiders

    known = {n for n, kind in vars(guiders).items() if isinstance(kind, type)} - {"BaseGuidance"}
    check_choice("guidance: class", name, sorted(known))
    try:
        return DiffusersGuider(getattr(guiders, name)(**config))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"guidance: config={shown(config)} is not {cut(name)}'s: {cut(error)}") from error
