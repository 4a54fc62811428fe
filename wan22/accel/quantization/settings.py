"""How transformers are quantised: the method, of which expert, and which blocks stay as they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...checks import as_number, check_choice, check_positive_int, cut, shown

KINDS = {"fp8": torch.float8_e4m3fn, "fp8_dynamic": torch.float8_e4m3fn, "int8": torch.int8}
# The experts' names, and the pipeline's components that they are.
EXPERTS = {"high": "transformer", "low": "transformer_2"}
_FORM = "such as 'fp8', 'fp8:low', 'int8:keep=1' or 'fp8:low:keep=1,2:block=128'"


@dataclass(frozen=True)
class Quantization:
    """Settings of quantised transformers, which texts such as "fp8:low:keep=1" are short for.

    Args:
        method: "fp8", "int8", "fp8_dynamic", or a configuration of torchao's.
        block: inputs that share a scale, for "fp8" and "int8"; None: all inputs of an output.
        only: "high" or "low" for the high-noise or the low-noise expert alone, or its component,
            "transformer" or "transformer_2"; None: all transformers.
        keep_blocks: how many of the first and of the last blocks stay in full precision, a pair, or one
            number for both.

    Raises: ValueError: there is no such method or expert, or a number is out of its range.
    """

    method: Any
    block: int | None = None
    only: str | None = None
    keep_blocks: tuple[int, int] | int = (0, 0)

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.only is not None:
            check_choice("only", self.only, [*EXPERTS, *EXPERTS.values()])
            names = {slot: name for name, slot in EXPERTS.items()}
            object.__setattr__(self, "only", names.get(self.only, self.only))
        object.__setattr__(self, "keep_blocks", _pair(self.keep_blocks))
        if self.block is not None:
            self._check_block()

    def _check_block(self) -> None:
        if not isinstance(self.method, str):
            raise ValueError(
                f"block={shown(self.block)} is for fp8 and int8; torchao's configurations have their own"
            )
        if self.method == "fp8_dynamic":
            raise ValueError("fp8_dynamic has one scale for all inputs of an output; leave block out")
        object.__setattr__(self, "block", check_positive_int("block", self.block))

    @classmethod
    def of(cls, value: Any, **others: Any) -> "Quantization":
        """Return what an argument says: settings, their text, or a method; `others` replace those not None.

        Raises: ValueError: a text is no such settings.
        """
        found = value if isinstance(value, cls) else _read(value) if isinstance(value, str) else cls(value)
        given = {name: setting for name, setting in others.items() if setting is not None}
        return replace(found, **given) if given else found

    @property
    def kept(self) -> tuple[int, int]:
        """How many of the first and of the last blocks stay in full precision."""
        first, last = self.keep_blocks  # type: ignore[misc]
        return first, last

    @property
    def is_plain(self) -> bool:
        """Whether it is a method alone, in all of every transformer."""
        return self == Quantization(self.method)

    @property
    def of_a_model(self) -> "Quantization":
        """The same of one transformer, whichever it is."""
        return replace(self, only=None)

    def slots(self, loaded: Iterable[str]) -> list[str]:
        """Return those of the loaded transformers, by component name, that are to be quantised.

        Raises: ValueError: the one that is asked for is not among them.
        """
        names = [name for name in loaded if self.only in (None, *_expert(name))]
        if not names:
            raise ValueError(f"only={shown(self.only)}: {EXPERTS[str(self.only)]} is not loaded")
        return names

    def __str__(self) -> str:
        method = self.method if isinstance(self.method, str) else type(self.method).__name__
        parts = [method, *filter(None, [self.only])]
        first, last = self.kept
        if first or last:
            parts.append(f"keep={first}" if first == last else f"keep={first},{last}")
        return ":".join([*parts, *([f"block={self.block}"] if self.block else [])])


def check_method(method: Any) -> None:
    """Refuse an unknown name of a method."""
    if isinstance(method, str) and method not in KINDS:
        raise ValueError(f"method {shown(method)} must be {', '.join(KINDS)} or a configuration of torchao")


def from_recipe(quantized: Any, experts: int) -> Quantization | None:
    """Return the settings that quantise transformers as a recipe's changes tell; None if one would not do.

    Args:
        quantized: the recipe's tables of formats by component, see `layers.formats_of`.
        experts: number of the pipeline's transformers, 1 or 2.
    """
    tables = quantized if isinstance(quantized, Mapping) else {}
    found = {slot: tables[slot] for slot in EXPERTS.values() if isinstance(tables.get(slot), Mapping)}
    if not found or any(table != next(iter(found.values())) for table in found.values()):
        return None
    table = dict(next(iter(found.values())))
    kept = _kept_in(table.pop(PLAIN, ""))
    if kept is None or len(table) != 1 or not {*table} <= {*KINDS}:
        return None
    only = next(iter(found)) if len(found) < experts else None
    return Quantization(next(iter(table)), only=only, keep_blocks=kept)


# ---- blocks, in words ----

PLAIN = "blocks kept"  # a recipe's entry beside the formats


def in_words(blocks: Sequence[int]) -> str:
    """Return numbers of blocks, rising, as text: "0-2, 39"."""
    runs: list[list[int]] = []
    for number in blocks:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _kept_in(text: Any) -> tuple[int, int] | None:
    """Return how many first and last blocks such a text names; None if it names others."""
    try:
        runs = [[int(n) for n in run.split("-")] for run in str(text).split(", ")] if text else []
    except ValueError:
        return None
    counts = [run[-1] - run[0] + 1 for run in runs]
    if len(runs) > 2 or any(count < 1 for count in counts) or (len(runs) == 2 and runs[0][0] != 0):
        return None
    first = counts.pop(0) if runs and runs[0][0] == 0 else 0
    return first, sum(counts)


# ---- texts ----


def _expert(slot: str) -> list[str]:
    return [name for name, own in EXPERTS.items() if own == slot]


def _pair(value: Any) -> tuple[int, int]:
    value = as_number(value)
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"keep_blocks={shown(value)} must be a number, or two: of first and of last blocks")
    first, last = (check_positive_int("keep_blocks", number, least=0) for number in pair)
    return first, last


def _read(text: str) -> Quantization:
    method, *parts = text.split(":")
    check_method(method)
    settings: dict[str, Any] = {}
    for part in parts:
        name, _, value = part.partition("=")
        setting = "only" if part in EXPERTS else {"keep": "keep_blocks", "block": "block"}.get(name)
        if setting is None or setting in settings:
            raise ValueError(f"quantize={shown(text)}: {cut(part)} is not known there; it is {_FORM}")
        settings[setting] = part if part in EXPERTS else _numbers(text, value)
    if isinstance(settings.get("block"), list):
        raise ValueError(f"quantize={shown(text)}: block is one number; it is {_FORM}")
    return Quantization(method, **settings)


def _numbers(text: str, value: str) -> Any:
    try:
        numbers = [int(number) for number in value.split(",")]
    except ValueError:
        raise ValueError(f"quantize={shown(text)}: {cut(value)} is no number; it is {_FORM}") from None
    return numbers[0] if len(numbers) == 1 else numbers
