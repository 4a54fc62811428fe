"""Step caches as a call is asked for them: names, presets, settings.

A cache is named with how much error it may make: "easy:low", "mag:medium", "taylor:high"; without, the preset
is "medium". The presets are measured on the miniature checkpoints, see the README of wan22/pipelines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ....checks import check_choice, check_positive_int, check_real, refuse_unknown, shown
from .ratios import CacheRatios

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# One for all experts, or one for the high-noise and one for the low-noise expert.
Numbers = float | tuple[float, float]
Counts = int | tuple[int, int]
LEVELS = ("low", "medium", "high")
WARMUP, WARMUP_OF_TWO = 0.3, (0.7, 0.1)


@dataclass(frozen=True)
class StepCache:
    """Settings of a step cache; what it knows of a call is in an object of that call.

    Each setting is one value, or a pair for the high-noise and the low-noise expert.

    Args:
        warmup: share of each expert's steps that is computed before any is skipped, 0 to 1; the first step
            always is. None is WARMUP, or WARMUP_OF_TWO for two experts, as the first steps settle most.
    """

    warmup: Numbers | None = field(default=None, kw_only=True)

    method: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    @classmethod
    def preset(cls, level: str) -> "Self":
        """Return the settings that make a "low", "medium" or "high" error."""
        check_choice("preset", level, LEVELS)
        return cls(**cls.presets[level])

    @property
    def residuals(self) -> int:
        """Tensors of the tokens' size that are kept of each pass and video."""
        return 0

    @property
    def is_per_expert(self) -> bool:
        """Whether a setting has a value for each expert."""
        values = (getattr(self, f.name) for f in fields(self))
        return any(isinstance(value, tuple) for value in values)

    def at(self, name: str, slot: str) -> Any:
        """Return a setting's value for an expert."""
        value = getattr(self, name)
        return value[slot == "transformer_2"] if isinstance(value, tuple) else value

    def plain(self) -> dict[str, Any]:
        """Return the settings as a recipe holds them; `cache_of` takes them again."""
        return {"method": self.method} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    def _check(self, **rules: Any) -> None:
        """Check fields by a function of name and value each, alone or in a pair, and keep what it returns."""
        for name, rule in {**rules, "warmup": _share}.items():
            value = getattr(self, name)
            if name == "warmup" and value is None:
                continue
            if isinstance(value, Sequence) and not isinstance(value, str):
                if len(value) != 2:
                    raise ValueError(f"{name}={shown(value)} must be one value, or one for each expert")
                value = tuple(rule(name, each) for each in value)
            else:
                value = rule(name, value)
            object.__setattr__(self, name, value)


def _threshold(name: str, value: Any) -> float:
    return check_real(name, value, 0, hint="0 skips nothing")


def _share(name: str, value: Any) -> float:
    return check_real(name, value, 0, 1, hint="0.2 is the first fifth of an expert's steps")


@dataclass(frozen=True)
class EasyCache(StepCache):
    """Skips steps while the estimated change of the velocity stays below a threshold.

    It looks at latents and velocities alone, so that any model will do, and nothing is measured beforehand.
    Each video decides for itself. It keeps two copies of a video's latents, and one for each pass.

    Args:
        threshold: sum of relative changes of the velocity at which a step is computed; 0 skips nothing.
        warmup: see StepCache.

    Source: EasyCache, arXiv 2507.02860; its thresholds are 0.05, 0.1 and 0.2, its warm-up 10 of 50 steps.
    """

    threshold: Numbers = 0.1

    method = "easy"
    presets = {
        "low": {"threshold": 0.08},
        "medium": {"threshold": 0.15},
        "high": {"threshold": 0.4},
    }

    def __post_init__(self) -> None:
        self._check(threshold=_threshold)


@dataclass(frozen=True)
class MagCache(StepCache):
    """Skips the transformer's blocks, and adds what they added before, while magnitudes tell of little error.

    The ratios of the residuals' magnitudes from step to step are measured once for a checkpoint and a shift;
    those of T2V-A14B, I2V-A14B, TI2V-5B and the miniatures are known, `pipe.calibrate_cache` measures others.
    It keeps one residual of each pass and video, "l d" in the dtype of the model's large layers: 0.77 GB in
    bfloat16 for 75,600 tokens of a 14B model.

    Args:
        threshold: accumulated error of the magnitude at which a step is computed; 0 skips nothing.
        most_skips: steps in a row that may be skipped, at least 1.
        warmup: see StepCache; None is, before all, the checkpoint's published one.
        ratios: `CacheRatios`, or the file of such; None are the known ones of the checkpoint.

    Source: MagCache, arXiv 2506.09045; for two experts, each has its own part of the ratios.
    """

    threshold: Numbers = 0.06
    most_skips: Counts = 2
    ratios: CacheRatios | None = None

    method = "mag"
    presets = {
        "low": {"threshold": 0.12, "most_skips": 2},
        "medium": {"threshold": 0.3, "most_skips": 3},
        "high": {"threshold": 0.6, "most_skips": 4},
    }

    def __post_init__(self) -> None:
        self._check(threshold=_threshold, most_skips=check_positive_int)
        given: Any = self.ratios
        if isinstance(given, str | Path):
            object.__setattr__(self, "ratios", CacheRatios.load(given))
        elif given is not None and not isinstance(given, CacheRatios):
            object.__setattr__(self, "ratios", CacheRatios.of(given, "ratios"))

    @property
    def residuals(self) -> int:
        """See StepCache."""
        return 1

    def plain(self) -> dict[str, Any]:
        """See StepCache."""
        bare = replace(self, ratios=None)
        return super(MagCache, bare).plain() | {"ratios": self.ratios and self.ratios.plain()}


@dataclass(frozen=True)
class TaylorCache(StepCache):
    """Computes every n-th step; for the others the blocks' residual is forecast by its differences.

    Nothing is measured beforehand. It keeps order + 1 tensors of each pass and video, each as large as
    MagCache's.

    Args:
        interval: steps from one computed step to the next, at least 1; 1 skips nothing.
        order: 0 repeats the last residual, 1 continues its line, 2 its parabola.
        warmup: see StepCache.

    Source: TaylorSeer, arXiv 2503.06923, applied to what all blocks add together.
    """

    interval: Counts = 2
    order: Counts = 1

    method = "taylor"
    presets = {
        "low": {"interval": 2},
        "medium": {"interval": 3},
        "high": {"interval": 5},
    }

    def __post_init__(self) -> None:
        self._check(interval=check_positive_int)
        self._check(order=lambda name, value: check_positive_int(name, value, most=2, least=0))

    @property
    def residuals(self) -> int:
        """See StepCache."""
        return 1 + max(self.at("order", slot) for slot in ("transformer", "transformer_2"))


CACHES: Mapping[str, type[StepCache]] = {cls.method: cls for cls in (EasyCache, MagCache, TaylorCache)}


def cache_of(value: Any) -> StepCache | None:
    """Return the step cache that a call is asked for.

    Args:
        value: "easy", "mag" or "taylor", alone or with a preset, "easy:low"; settings, or their plain values,
            as a recipe has them; `CacheRatios`, or their file, which ends in ".json", for "mag"; or None.

    Raises: ValueError: there is no such cache, preset or setting.
    """
    if value is None or isinstance(value, StepCache):
        return value
    if isinstance(value, CacheRatios):
        return replace(MagCache.preset("medium"), ratios=value)
    if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".json")):
        return replace(MagCache.preset("medium"), ratios=CacheRatios.load(value))
    if isinstance(value, str):
        method, _, level = value.partition(":")
        check_choice("cache", method, CACHES)
        if level and level not in LEVELS:
            raise ValueError(f"cache={shown(value)}: the preset must be one of {', '.join(LEVELS)}")
        return CACHES[method].preset(level or "medium")
    if isinstance(value, Mapping):
        method = str(value.get("method"))
        check_choice("cache's method", method, CACHES)
        settings = {name: setting for name, setting in value.items() if name != "method"}
        if isinstance(settings.get("ratios"), str):  # a recipe may be anybody's, and opens no file
            raise ValueError(f"cache's ratios={shown(settings['ratios'])} must be values, not a file's name")
        refuse_unknown(f"cache {method}", settings, [f.name for f in fields(CACHES[method])])
        return CACHES[method](**settings)
    raise ValueError(
        f"cache={shown(value)} must be a name such as 'easy:low', or settings such as EasyCache()"
    )
