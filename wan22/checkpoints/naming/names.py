"""Tensors' names: a model's own for those of a file."""

from collections.abc import Collection, Iterable, Sequence

from ...checks import listed
from .dialects import Tensors
from .keys import KeyTable


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor's values."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def count_known(names: Collection[str], table: KeyTable) -> int:
    """Return how many names a table knows, in the direction in which they are more."""
    return max(table.count(names), table.inverse.count(names))


def own_names(
    source: str, names: Iterable[str], tables: Sequence[KeyTable], noun: str = "this model"
) -> dict[str, str]:
    """Return the file's name of each of a model's own names.

    The file's names are the model's own, or those of one of `tables`; the best one counts, and a ValueError
    lists the first few names that it lacks. `source` and `noun` are the file and the model, for errors.
    """
    names = list(names)
    table = max(tables, key=lambda table: count_known(names, table))
    if table.count(names) >= table.inverse.count(names):
        own = {name: table.rename(name) for name in names}
    else:
        own = {name: name if table.inverse.rename(name) else None for name in names}
    if unknown := [name for name, other in own.items() if other is None]:
        raise ValueError(f"{source} holds {listed(unknown)}, which {noun} has no place for")
    return {other: name for name, other in own.items() if other is not None}
