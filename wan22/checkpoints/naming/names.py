"""Tensors' names: official ones from either naming, and lists of them for errors."""

from collections.abc import Iterable

from .dialects import Tensors
from .keys import KeyTable


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor's values."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def official_names(source: str, tensors: Tensors, table: KeyTable, ignored: Iterable[str] = ()) -> Tensors:
    """Return tensors under official names, whether the file has those or ours.

    Args:
        source: the file, for errors.
        tensors: without prefixes.
        table: from official names to ours.
        ignored: names of modules that files hold and no model uses.

    Raises:
        ValueError: tensors have no name in the table; the first few are named.
    """
    tensors = without(tensors, ignored)
    inverse = table.inverse
    if table.count(tensors) >= inverse.count(tensors):
        names = {name: name if table.rename(name) else None for name in tensors}
    else:
        names = {name: inverse.rename(name) for name in tensors}
    if unknown := [name for name, official in names.items() if official is None]:
        raise ValueError(f"{source} holds {listed(unknown)}, which this model has no place for")
    return {official: tensors[name] for name, official in names.items() if official is not None}


def without(tensors: Tensors, ignored: Iterable[str]) -> Tensors:
    """Leave out the tensors of modules with these names."""
    unused = set(ignored)
    return {name: t for name, t in tensors.items() if unused.isdisjoint(name.split("."))}


def listed(names: Iterable[str]) -> str:
    """Name the first few, in order, and count the rest."""
    first, *rest = sorted(names)
    rest, more = rest[:2], len(rest) - 2
    return ", ".join([first, *rest]) + (f" and {more} more" if more > 0 else "")
