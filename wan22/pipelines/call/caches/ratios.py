"""Ratios of the blocks' residuals from step to step, which MagCache goes by: known, measured, in files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....checks import cut, shown
from ....whole_files import whole_file

FORMAT = 1
_KEY = "wan22_cache_ratios"
_SLOTS = ("transformer", "transformer_2")
# A file of two experts with 100 steps each has 2,000 characters.
_MOST_TEXT, _MOST_STEPS, _LARGEST = 2**20, 10_000, 1000.0


@dataclass(frozen=True)
class CacheRatios:
    """How much larger the blocks' residual is than at the step before, for each step of each expert.

    A ratio is the mean over tokens of the quotient of their L2 norms; that of an expert's first step is 1.

    Args:
        ratios: by the expert's slot, "transformer" or "transformer_2", one ratio per step.
        shift: of the schedule that they were measured with; None for one given by its values.
        checkpoint: name of the checkpoint.
        warmup: by slot, the share of steps that is computed at first, where it is published.
    """

    ratios: Mapping[str, tuple[float, ...]]
    shift: float | None = None
    checkpoint: str = ""
    warmup: Mapping[str, float] = field(default_factory=dict)

    def __hash__(self) -> int:
        """Hash what tells most of them apart; their tables have no hash."""
        return hash((self.checkpoint, self.shift, *self.ratios))

    def resampled(self, slot: str, count: int) -> list[float]:
        """Return an expert's ratios for another number of steps: those of the nearest ones.

        Raises: ValueError: the expert has none.
        """
        if slot not in self.ratios:
            has = ", ".join(self.ratios)
            raise ValueError(
                f"the cache's ratios are those of {has}, and this call runs {slot}, too; "
                "pipe.calibrate_cache(prompts) measures them for this checkpoint"
            )
        own = self.ratios[slot]
        if count == 1:
            return [own[0]]
        return [own[round(i * (len(own) - 1) / (count - 1))] for i in range(count)]

    def plain(self) -> dict[str, Any]:
        """Return plain values, as `of` takes them."""
        ratios = {slot: list(values) for slot, values in self.ratios.items()}
        found = {"checkpoint": self.checkpoint, "shift": self.shift, "ratios": ratios}
        return found | ({"warmup": dict(self.warmup)} if self.warmup else {})

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, which `cache=` takes; one of that name is replaced."""
        path = Path(path)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({_KEY: FORMAT, **self.plain()}) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "CacheRatios":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else; the message names the file.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            if path.stat().st_size > _MOST_TEXT:
                raise ValueError(f"it has more than {_MOST_TEXT} bytes")
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop(_KEY, None) != FORMAT:
                raise ValueError(f"it has no entry {_KEY}={FORMAT}")
            return cls.of(values, "")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} has no ratios of a step cache: {cut(error)}") from error

    @classmethod
    def of(cls, values: Any, entry: str) -> "CacheRatios":
        """Check plain values; a ValueError names what is wrong, within the entry."""
        where = f"{entry}." if entry else ""
        if not isinstance(values, Mapping) or not isinstance(values.get("ratios"), Mapping):
            raise ValueError(f"{where}ratios must be a table of lists, by expert")
        if unknown := sorted(map(str, values.keys() - {"ratios", "shift", "checkpoint", "warmup"})):
            raise ValueError(f"{where}{cut(unknown[0])} is no entry of ratios")
        shift, checkpoint = values.get("shift"), values.get("checkpoint", "")
        if shift is not None and not (_is_number(shift) and 0 < shift <= _LARGEST):
            raise ValueError(f"{where}shift={shown(shift)} must be a number above 0, at most {_LARGEST:g}")
        if not isinstance(checkpoint, str) or len(checkpoint) > 4096:
            raise ValueError(f"{where}checkpoint={shown(checkpoint)} must be a name")
        warmup = values.get("warmup", {})
        if not isinstance(warmup, Mapping) or not all(_is_number(w) and 0 <= w <= 1 for w in warmup.values()):
            raise ValueError(f"{where}warmup={shown(warmup)} must be a table of shares, 0 to 1")
        slots = [*values["ratios"], *warmup]
        if not values["ratios"] or any(slot not in _SLOTS for slot in slots):
            raise ValueError(f"{where}ratios and warmup are by {' and '.join(_SLOTS)}, not {shown(slots)}")
        ratios = {s: _checked(f"{where}ratios.{s}", listed) for s, listed in values["ratios"].items()}
        return cls(ratios, None if shift is None else float(shift), checkpoint, dict(warmup))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked(entry: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not 1 <= len(values) <= _MOST_STEPS:
        raise ValueError(f"{entry} must be a list of 1 to {_MOST_STEPS} numbers")
    for i, value in enumerate(values):
        if not _is_number(value) or not 0 < value <= _LARGEST:
            raise ValueError(f"{entry}[{i}]={shown(value)} must be above 0 and at most {_LARGEST:g}")
    return tuple(map(float, values))
