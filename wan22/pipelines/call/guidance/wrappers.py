"""What changes another formula's passes or its velocity: gating, skipped layers, rescaling.

Each takes the formula that it wraps as an object or by its name; plain guidance by default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ....checkpoints.loading.models import is_ours
from ....checks import check_positive_int, check_real, shown
from ....private_apis import is_group_offloaded
from ..experts import Step
from .guider import ClassifierFreeGuidance, Guider, Memory, PassSettings, Predictions, first_step

_TINY = 1e-12


@dataclass(frozen=True)
class Wrapper(Guider):
    """A formula around another one."""

    guider: Any = field(default_factory=ClassifierFreeGuidance)

    @property
    def own_scale(self) -> float | None:
        """The wrapped formula's."""
        return self.guider.own_scale

    def check(self, models: Sequence[Any]) -> None:
        """See the wrapped formula."""
        self.guider.check(models)

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return the wrapped formula's."""
        return self.guider.passes(step, scale, since)

    def combine(self, predicted: Predictions, scale: float, step: Step, memory: Memory) -> torch.Tensor:
        """Return the wrapped formula's velocity."""
        return self.guider.combine(predicted, scale, step, memory)


@dataclass(frozen=True)
class Gated(Wrapper):
    """Guides later steps by the last known difference: u = c - d, d = c - u of the last step that had both.

    At gated steps only the pass with the prompt runs. The first step of each expert has both.

    Args:
        guider: a formula of c and u.
        after: share of the schedule's steps after which gating begins, 0 to 1; 1 gates none.
        refresh: gated steps after which one has both again, at least 1; None: none has.

    Source: arXiv 2312.12487, LinearAG with one earlier difference; hao-ai-lab/FastVideo.
    """

    name = "gated"

    after: float = 0.25
    refresh: int | None = 5

    def __post_init__(self) -> None:
        check_real("after", self.after, 0, 1)
        if self.refresh is not None:
            check_positive_int("refresh", self.refresh)

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return the wrapped formula's, without that for u at gated steps."""
        needed = self.guider.passes(step, scale, since)
        fresh = since is None or (self.refresh is not None and since > self.refresh)
        if fresh or step.index < first_step(self.after, step.count):
            return needed
        return {name: settings for name, settings in needed.items() if name != "uncond"}

    def combine(self, predicted: Predictions, scale: float, step: Step, memory: Memory) -> torch.Tensor:
        """Return the wrapped formula's velocity, for u as it is or as it was."""
        if "uncond" in predicted:
            memory["difference"] = predicted["cond"] - predicted["uncond"]
        elif "difference" in memory and "uncond" in self.guider.passes(step, scale, None):
            predicted = {**predicted, "uncond": predicted["cond"] - memory["difference"]}
        return self.guider.combine(predicted, scale, step, memory)


@dataclass(frozen=True)
class SkipLayer(Wrapper):
    """Skip-layer guidance: another pass with the prompt skips layers; v gains scale (c - c_skip).

    Args:
        guider: the formula whose velocity gains it; at a scale of 1 there are c and c_skip alone.
        layers: indices of the transformers' blocks, or one.
        scale: 0 or more.
        start: share of the schedule's steps at which it starts.
        stop: share at which it stops.

    Source: Stability-AI/sd3.5 and diffusers, SkipLayerGuidance; layers are those in use with Wan.
    """

    name = "slg"

    layers: Sequence[int] | int = (9,)
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        given = [self.layers] if isinstance(self.layers, int) else self.layers
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise ValueError(f"layers={shown(self.layers)} must be the index of a layer, or several")
        layers = tuple(sorted({check_positive_int("layers", layer, least=0) for layer in given}))
        object.__setattr__(self, "layers", layers)
        check_real("scale", self.scale, 0)
        check_real("stop", self.stop, check_real("start", self.start, 0, 1), 1)

    def check(self, models: Sequence[Any]) -> None:
        """Refuse transformers of others, with fewer layers, or whose layers something else counts."""
        super().check(models)
        for model in models:
            if not is_ours(model):
                raise ValueError(
                    f"guidance='slg' skips layers of wan22's own transformer, not of diffusers' "
                    f"{type(model).__name__}; load it with wan22.WanTransformer3DModel"
                )
            if (highest := max(self._layers)) >= len(model.blocks):
                last = len(model.blocks) - 1
                raise ValueError(f"layers={highest}: the transformer's layers are 0 to {last}")
            if model.is_cache_enabled:
                raise ValueError("guidance='slg' skips layers that a step cache counts; call disable_cache()")
            if is_group_offloaded(model):
                raise ValueError(
                    "guidance='slg' skips layers, and diffusers' group offloading brings the next before it "
                    "is called; pipe.fit(...) streams layers in any order"
                )

    @property
    def _layers(self) -> tuple[int, ...]:
        return self.layers  # type: ignore[return-value]

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return the wrapped formula's, and "skip" between start and stop."""
        needed = self.guider.passes(step, scale, since)
        start, stop = (first_step(share, step.count) for share in (self.start, self.stop))
        if not needed or not self.scale or not start <= step.index < stop:
            return needed
        return {**needed, "skip": PassSettings(skip_layers=self._layers)}

    def combine(self, predicted: Predictions, scale: float, step: Step, memory: Memory) -> torch.Tensor:
        """Return v + scale (c - c_skip)."""
        velocity = self.guider.combine(predicted, scale, step, memory)
        if "skip" not in predicted:
            return velocity
        return velocity + self.scale * (predicted["cond"] - predicted["skip"])


@dataclass(frozen=True)
class Rescale(Wrapper):
    """Gives the velocity the spread of c: v (phi std(c) / std(v) + 1 - phi), against overexposure.

    Args:
        guider: the formula of v.
        phi: 0 leaves v as it is; 1 gives it c's standard deviation.

    Source: arXiv 2305.08891, section 3.4.
    """

    name = "rescale"

    phi: float = 0.7

    def __post_init__(self) -> None:
        check_real("phi", self.phi, 0, 1)

    def combine(self, predicted: Predictions, scale: float, step: Step, memory: Memory) -> torch.Tensor:
        """Return v (phi std(c) / std(v) + 1 - phi)."""
        velocity, cond = self.guider.combine(predicted, scale, step, memory), predicted["cond"]
        if velocity is cond:
            return cond
        ratio = cond.std() / velocity.std().clamp(min=_TINY)
        return velocity * (self.phi * ratio + 1 - self.phi)
