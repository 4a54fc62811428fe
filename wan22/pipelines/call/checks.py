"""Checks of a call's arguments. Each error names the value, the rule and the nearest valid value."""

from collections.abc import Sequence
from typing import Any

import torch

from ...checks import check_real, shown
from ...devices import HostCopies
from ...presets import MAX_TEXT_TOKENS
from .experts import Step


def check_guidance(name: str, value: Any) -> float:
    """Return a guidance scale; refuse one below 1, where libraries disagree about the meaning."""
    return check_real(name, value, 1, hint="1 turns guidance off")


def as_prompts(name: str, prompt: str | Sequence[str] | None, count: int | None = None) -> list[str]:
    """Return a list of prompts; with a count, of that many, one string being repeated."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, not {describe(prompt)}")
    if count is not None and len(prompts) != count:
        if not isinstance(prompt, str):
            raise ValueError(
                f"{name} has {len(prompts)} entries for {count} prompts; give {count}, or one string"
            )
        prompts = [prompt] * count
    return list(prompts)


def check_embeds(name: str, embeds: Any, width: int, count: int | None = None) -> None:
    """Refuse embeddings that are not "b l width" with at most 512 tokens l, for `count` prompts."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or not embeds.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor 'b l {width}', not {describe(embeds)}")
    b, tokens, d = embeds.shape
    if b < 1 or d != width or not 1 <= tokens <= MAX_TEXT_TOKENS:
        rule = f"it must be 'b l {width}' with 1 to {MAX_TEXT_TOKENS} tokens l"
        raise ValueError(f"{name} has shape {tuple(embeds.shape)}; {rule}")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{name} must be finite; it holds NaN or infinity")
    if count is not None and b != count:
        raise ValueError(f"{name} is for {b} prompts; it must be for {count}")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Refuse latents of another shape, or with broken numbers."""
    if (
        not isinstance(latents, torch.Tensor)
        or tuple(latents.shape) != shape
        or not latents.is_floating_point()
    ):
        raise ValueError(f"latents must be a floating-point tensor of shape {shape}, not {describe(latents)}")
    if not torch.isfinite(latents).all():
        raise ValueError(f"latents of shape {shape} must be finite; they hold NaN or infinity")


def describe(value: Any) -> str:
    """Say in an error what a value is."""
    return shown(value) if isinstance(value, torch.Tensor) else f"{type(value).__name__} {shown(value)}"


class FiniteCheck:
    """Refuses latents that are not finite by a FloatingPointError that names the step and the model.

    On a GPU a step's result is known one step later, so that the host does not wait for each of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._flags: HostCopies[Step] = HostCopies(device)

    def add(self, latents: torch.Tensor, step: Step) -> None:
        """Look at the latents after a step, and refuse those of an earlier one."""
        self._flags.put(step, torch.isfinite(latents).all())
        for earlier, (finite,) in self._flags.arrived():
            _refuse_unless(finite, earlier)

    def finish(self) -> None:
        """Refuse those of the last step."""
        for step, (finite,) in self._flags.rest():
            _refuse_unless(finite, step)


def _refuse_unless(finite: torch.Tensor, step: Step) -> None:
    if not finite:
        expert, dtype = step.expert, step.expert.model and step.expert.model.dtype
        where = f"{expert.label or 'the only'} expert, pipe.{expert.slot} in {dtype}"
        raise FloatingPointError(
            f"the latents are not finite after step {step.number} of {step.count} "
            f"(timestep {float(step.timestep):g}, {where})"
        )
