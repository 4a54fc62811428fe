"""The passes of a step, as far as plans need to know them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...models.attention_guidance import AttentionGuidance


class PassKind(NamedTuple):
    """What sets a pass of the transformer apart from others in memory or time."""

    skip_layers: tuple[int, ...] = ()  # indices of the blocks that do not run
    attention: AttentionGuidance | None = None  # how cross-attention, to two texts, keeps away from one


Passes = tuple[PassKind, ...]
PLAIN = PassKind()
UNGUIDED: Passes = (PLAIN,)
GUIDED: Passes = UNGUIDED * 2


def grouped(passes: Sequence[PassKind]) -> list[tuple[PassKind, int]]:
    """Return each kind and the number of its passes: those run the same blocks, and can run together."""
    return [(kind, passes.count(kind)) for kind in dict.fromkeys(passes)]


def most_of(steps: Iterable[Passes]) -> Passes:
    """Return the passes of the step that takes the most memory; at least one."""
    return max(steps, key=_weight, default=UNGUIDED) or UNGUIDED


def covers(planned: Sequence[PassKind], needed: Sequence[PassKind]) -> bool:
    """Whether a plan for some passes of a step has room for others."""
    fewer = len(needed) <= len(planned)
    return fewer and (_attends_twice(planned) or not _attends_twice(needed))


def _weight(passes: Passes) -> tuple[int, bool]:
    return len(passes), _attends_twice(passes)


def _attends_twice(passes: Sequence[PassKind]) -> bool:
    return any(kind.attention is not None for kind in passes)
