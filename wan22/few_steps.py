"""How checkpoints and LoRAs that are distilled to a few steps run: a table of settings for each.

A table has the timesteps that were trained, the solver, and what differs between ranges of them: which expert
runs, how strong LoRAs are, and the guidance scale. `distilled=` takes a name below, or a table of your own.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from .checks import check_choice, check_positive_int, check_real, cut, shown, unknown_argument

SLOTS = ("transformer", "transformer_2")
# Steps of a schedule so short that it is a distilled model's.
FEW = 12
_LARGEST_STRENGTH = 100.0


@dataclass(frozen=True)
class Phase:
    """Settings of the steps down to a timestep, below those of the phase before.

    Args:
        down_to: the phase's lowest timestep, 0 to 1000; 0 for the last phase.
        expert: "transformer" (high noise) or "transformer_2" (low noise); None: the checkpoint's boundary
            says.
        guidance_scale: at least 1, which turns guidance off.
        lora: factor of the strength of the distilled LoRA, 0 turns it off; or a table of factors by the names
            of adapters. The others have the strengths they were loaded with.

    Raises: ValueError: a value is outside of its range.
    """

    down_to: float
    expert: str | None = None
    guidance_scale: float = 1.0
    lora: float | Mapping[str, float] = 1.0

    def __post_init__(self) -> None:
        check_real("down_to", self.down_to, 0, 1000)
        if self.expert is not None:
            check_choice("expert", self.expert, SLOTS)
        check_real("guidance_scale", self.guidance_scale, 1)
        for factor in self.lora.values() if isinstance(self.lora, Mapping) else [self.lora]:
            check_real("lora", factor, -_LARGEST_STRENGTH, _LARGEST_STRENGTH)


@dataclass(frozen=True)
class FewSteps:
    """Settings of a distilled checkpoint or LoRA.

    Args:
        timesteps: those that it was trained on, falling, in (0, 1000].
        sigmas: the noise levels that belong to them, in (0, 1]; None: a thousandth of them.
        stochastic: whether each step predicts the clean video and adds fresh noise, of each video's own
            generator, down to the next level; otherwise a step is one of Euler's method.
        noise_scale: factor of the noise that sampling starts from, above 0.
        phases: from pure noise on; default is one without guidance.

    Raises: ValueError: a value is outside of its range, or the lists differ in length.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None = None
    stochastic: bool = False
    noise_scale: float = 1.0
    phases: tuple[Phase, ...] = (Phase(0),)

    def __post_init__(self) -> None:
        for name, most in (("timesteps", 1000), ("sigmas", 1)):
            values = getattr(self, name)
            for i, value in enumerate(values or ()):
                check_real(f"{name}[{i}]", value, 0, most, above=True)
            if any(low >= high for high, low in pairwise(values or ())):
                raise ValueError(f"{name}={shown(values)} must fall at every step")
        check_positive_int("the number of timesteps", len(self.timesteps), most=1000)
        if self.sigmas is not None and len(self.sigmas) != len(self.timesteps):
            raise ValueError(f"{len(self.sigmas)} sigmas for {len(self.timesteps)} timesteps; give as many")
        if not isinstance(self.stochastic, bool):
            raise ValueError(f"stochastic={shown(self.stochastic)} must be True or False")
        check_real("noise_scale", self.noise_scale, 0, above=True)
        ends = [phase.down_to for phase in self.phases]
        if not ends or ends[-1] != 0 or any(low >= high for high, low in pairwise(ends)):
            raise ValueError(f"down_to of the phases is {shown(ends)}; it must fall, to 0 in the last one")

    def phase_of(self, timestep: float) -> Phase:
        """Return the phase of a timestep."""
        return next(phase for phase in self.phases if timestep >= phase.down_to)

    @property
    def guidance_scales(self) -> list[float]:
        """The guidance scale of each step."""
        return [self.phase_of(timestep).guidance_scale for timestep in self.timesteps]

    @property
    def changes_strengths(self) -> bool:
        """Whether LoRAs have other strengths in some steps than those they were loaded with."""
        return any(phase.lora != 1 for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FewSteps":
        """Return the settings of plain values, as `to_dict` gives them and recipes hold them.

        Raises: ValueError: an entry is unknown or missing, or its value is none that it can have.
        """
        _check_entries(cls, values)
        phases = values.get("phases", [{"down_to": 0}])
        if not _is_list(phases) or not all(isinstance(phase, Mapping) for phase in phases):
            raise ValueError(f"phases={shown(phases)} must be a list of tables")
        for phase in phases:
            _check_entries(Phase, phase)
        lists = {name: values[name] for name in ("timesteps", "sigmas") if values.get(name) is not None}
        for name, numbers in lists.items():
            if not _is_list(numbers):
                raise ValueError(f"{name}={shown(numbers)} must be a list of numbers")
        as_tuples = {name: tuple(numbers) for name, numbers in lists.items()}
        return cls(**{**values, **as_tuples, "phases": tuple(Phase(**phase) for phase in phases)})


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _check_entries(cls: Any, values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(cls)]
    if unknown := sorted(map(str, values.keys() - known)):
        raise ValueError(unknown_argument(f"distilled, a table of {cls.__name__},", unknown[0], known))
    if known[0] not in values:
        raise ValueError(f"distilled, a table of {cls.__name__}, has no {known[0]}")


def _shifted(levels: tuple[float, ...], shift: float) -> tuple[float, ...]:
    return tuple(1000 * shift * s / (1 + (shift - 1) * s) for s in levels)


def _trigflow(largest: float, *, stochastic: bool) -> FewSteps:
    """Return rCM's four steps: angles from that of the largest ratio of noise to signal down."""
    angles = (math.atan(largest), 1.5, 1.4, 1.0)
    levels = tuple(math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles)
    times = tuple(1000 * level for level in levels)
    return FewSteps(times, stochastic=stochastic, noise_scale=levels[0])


_EIGHTHS = tuple(1 - i / 8 for i in range(8))

FEW_STEPS = {
    # lightx2v/Wan2.2-Lightning: four even steps at shift 5.
    "lightning-4": FewSteps(_shifted((1, 0.75, 0.5, 0.25), 5)),
    # The same LoRAs with the motion of the undistilled expert in the first step: eight steps at shift 3.
    "lightning-3-phase": FewSteps(
        _shifted(_EIGHTHS, 3),
        phases=(
            Phase(965, "transformer", guidance_scale=3.5, lora=0.0),
            Phase(800, "transformer"),
            Phase(0, "transformer_2"),
        ),
    ),
    # NVlabs/rcm, Wan 2.1 T2V; noise up to 80 times the signal.
    "rcm-4": _trigflow(80, stochastic=True),
    "rcm-4-ode": _trigflow(80, stochastic=False),
    # thu-ml/TurboDiffusion, TurboWan2.2-I2V-A14B; up to 200 times.
    "turbo": _trigflow(200, stochastic=True),
    "turbo-ode": _trigflow(200, stochastic=False),
    # FastVideo/FastWan2.2-TI2V-5B-FullAttn: the model gets whole timesteps, of the nearest levels in the
    # table of a thousand at shift 8.
    "fastwan-3": FewSteps(
        (1000, 757, 522), (1.0, *(t / 1000 for t in _shifted((0.28, 0.12), 8))), stochastic=True
    ),
}
# What the names of distilled weights contain, in lower case, and the settings that suit them.
_NAMES = {
    "turbowan": "turbo",
    "turbodiffusion": "turbo",
    "fastwan": "fastwan-3",
    "rcm": "rcm-4",
    "lightning": "lightning-4",
    "lightx2v": "lightning-4",
}


def read_few_steps(value: Any) -> FewSteps:
    """Return the settings that `distilled` asks for: by their name, as a table, also in JSON, or as they are.

    Raises: ValueError: there is no such name, or it is no such table.
    """
    if isinstance(value, FewSteps):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"distilled={shown(value)} must be a name, or JSON: {error}") from None
    if isinstance(value, Mapping):
        return FewSteps.from_dict(value)
    check_choice("distilled", value, tuple(FEW_STEPS))
    return FEW_STEPS[value]


def looks_distilled(source: str) -> str | None:
    """Return the name of the settings that a file's or a repository's name calls for; None: none is known."""
    words = "/".join(source.lower().replace("\\", "/").split("/")[-2:])  # not folders further up
    return next((name for part, name in _NAMES.items() if re.search(rf"(?<![a-z]){part}", words)), None)


def distilled_adapters(sources: Mapping[str, str | None]) -> list[str]:
    """Return which of a transformer's adapters is the distilled one: the only one, or by its file's name.

    Args:
        sources: file, folder or repository by the adapter's name.

    Raises: ValueError: there is none, or nothing tells which it is.
    """
    if not sources:
        raise ValueError(
            "distilled= changes the strength of a distilled LoRA between steps, and none is loaded; load it "
            "with load_lora_weights first"
        )
    named = [name for name, source in sources.items() if looks_distilled(f"{source or ''} {name}")]
    if len(sources) > 1 and not named:
        raise ValueError(
            "distilled= changes the strength of the distilled LoRA, and nothing tells which of "
            f"{cut(', '.join(sources))} that is; load it with adapter_name='lightning'"
        )
    return named or list(sources)
