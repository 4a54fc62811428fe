"""Checks of plain arguments. Each error names argument, value, rule and the nearest valid value."""

import difflib
import errno
import inspect
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

# ---- what a message shows of a value ----

LONGEST = 300  # characters that a message shows of one value
_LONGEST_PATH, _LONGEST_NAME = 4096, 255
_MOST_BITS = 1024  # of a whole number that is written out; Python refuses to write very large ones
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = _REPR.maxdeque = 8
_REPR.maxlevel = 3


def shown(value: Any) -> str:
    """Return a value as messages show it: its repr, at most `LONGEST` characters long; a tensor's shape."""
    value = as_number(value)
    if getattr(value, "shape", ()) and hasattr(value, "dtype"):
        kind = "tensor" if hasattr(value, "requires_grad") else "array"
        return f"a {cut(value.dtype).removeprefix('torch.')} {kind} of shape {cut(tuple(value.shape))}"
    if _is_int(value) and value.bit_length() > _MOST_BITS:
        return f"an int of {value.bit_length()} bits"
    return cut(_REPR.repr(value))


def cut(text: Any) -> str:
    """Return a text, or what str() makes of a value, for a message: printable, without its middle if long."""
    text, half = str(text), LONGEST // 2 - 2
    return printable(text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}")


def listed(names: Iterable[str], most: int = 3) -> str:
    """Name the first few, in order, each in bounded length, and count the rest."""
    first = [*map(cut, sorted(names))]
    more = len(first) - most
    return ", ".join(first[:most]) + (f" and {more} more" if more > 0 else "")


def printable(text: str, keep: str = "") -> str:
    """Return a text from outside as a terminal may show it, on one line.

    Control characters but those in `keep`, line separators, marks that turn the direction of writing, and
    lone surrogates become escapes.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def as_path(path: Any) -> Path:
    """Return a path with its ~ expanded; an OSError refuses one that no file system has, in a few words."""
    path = Path(path).expanduser()
    if len(str(path)) > _LONGEST_PATH or max(map(len, path.parts), default=0) > _LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, f"{cut(path)} is too long for a file's name")
    return path


# ---- numbers ----


def as_number(value: Any) -> Any:
    """Return a number of any library as int or float, and anything else, also a truth value, as it is."""
    if (
        getattr(value, "shape", None) == ()
        and hasattr(value, "item")
        and not getattr(value, "is_meta", False)
    ):
        number = value.item()  # a scalar of NumPy, or an array or tensor without dimensions
        return number if _is_real(number) else value
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def with_plain_numbers(value: Any) -> Any:
    """Return a value with the numbers in its lists, tuples and dicts as `as_number` gives them."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(with_plain_numbers(inner) for inner in value)
    if type(value) is dict:
        return {name: with_plain_numbers(inner) for name, inner in value.items()}
    return as_number(value)


def check_positive_int(name: str, value: Any, most: int | None = None, least: int = 1) -> int:
    """Return a count as int; refuse what is not a whole number from `least` to `most`."""
    value = as_number(value)
    if _is_int(value) and value >= least and (most is None or value <= most):
        return int(value)
    rule = f"at least {least}" if most is None else f"{least} to {_written(most)}"
    nearest = max(least, round(value)) if _is_finite(value) else least
    nearest = nearest if most is None else min(nearest, most)
    hint = (
        f"the nearest is {shown(nearest)}" if _is_finite(value) or most is not None else f"such as {nearest}"
    )
    raise ValueError(f"{name}={shown(value)} must be an int, {rule}; {hint}")


def check_real(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    hint: str = "",
    above: bool = False,
) -> float:
    """Return a finite number from `least` to `most`, or above `least`; `hint` says more of the rule.

    A whole number of more than 64 bits, which torch does not take, becomes a float.
    """
    value = as_number(value)
    finite = _is_finite(value) and abs(value) <= sys.float_info.max
    if finite and least <= value <= most and not (above and value == least):
        return value if abs(value) < 2**63 else float(value)
    rules = ["a finite number" if _is_real(value) and not finite else "a number"]
    if least > -math.inf:
        rules.append(f"above {least:g}" if above else f"{least:g} or more")
    if most < math.inf:
        rules.append(f"at most {most:g}")
    if not hint and _is_real(value) and not above and value == value:  # not NaN
        nearest = least if value < least else most
        hint = f"the nearest is {nearest:g}" if math.isfinite(nearest) else ""
    raise ValueError(f"{name}={shown(value)} must be {', '.join(rules)}{hint and '; '}{hint}")


def check_size(name: str, value: Any, multiple: int) -> int:
    """Return a width or height as int; refuse what is not a positive multiple of what one token covers."""
    value = as_number(value)
    if not _is_int(value) or value <= 0 or value % multiple:
        nearest = _nearest(value, multiple)
        raise ValueError(
            f"{name}={shown(value)} must be an int, a positive multiple of {multiple}; {nearest}"
        )
    return int(value)


def check_num_frames(value: Any, stride: int) -> int:
    """Return a frame count as int; refuse one that does not fill whole latent frames."""
    value = as_number(value)
    if not _is_int(value) or value < 1 or (value - 1) % stride:
        nearest = _nearest(value, stride, plus=1, least=0)
        raise ValueError(f"num_frames={shown(value)} must be an int, 1 + a multiple of {stride}; {nearest}")
    return int(value)


def parse_bytes(amount: Any, name: str = "amount") -> int:
    """Return a number of bytes: 12 * 10**9 for "12GB", 12 * 2**30 for "12GiB"; a number stays as it is.

    A rate, such as "1.5GB/s", gives bytes a second.
    """
    amount = as_number(amount)
    text = cut(amount) if isinstance(amount, str) else shown(amount)
    match = re.fullmatch(r"(\d+\.?\d*(?:E\+?\d+)?)\s*([KMGT]?I?)B?(?:/S)?", text.strip().upper())
    value = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if not 1 <= value < math.inf:
        rule = "must be at least one byte, written as '12GB', '11.5GiB' or a number of bytes"
        raise ValueError(f"{name}={shown(amount)} {rule}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # A whole number beyond the largest float is not finite to math.isfinite, but an OverflowError.
    return _is_real(value) and (isinstance(value, int) or math.isfinite(value))


def _written(bound: int) -> str:
    power = bound.bit_length()
    return f"2**{power} - 1" if power > 32 and bound == 2**power - 1 else str(bound)


def _nearest(value: Any, multiple: int, plus: int = 0, least: int = 1) -> str:
    if not _is_finite(value):
        return f"give an int such as {plus + multiple * 4}"
    below = max(int((value - plus) // multiple), least)
    return f"the nearest are {shown(plus + below * multiple)} and {shown(plus + (below + 1) * multiple)}"


# ---- choices, names ----

# Earlier names of a call's arguments.
RENAMED = {"recipe": "distilled"}


def unknown_argument(what: str, name: str, known: Iterable[str]) -> str:
    """Return a message about an argument that does not exist, with the nearest, or its new name, if any."""
    known = list(known)
    if RENAMED.get(name) in known:
        return f"{what}: {name} is called {RENAMED[name]} now"
    near = difflib.get_close_matches(cut(name), known, 1, 0.5)
    return f"{what} has no argument {cut(name)}; " + (
        f"the nearest is {near[0]}" if near else f"it has {cut(', '.join(sorted(known)))}"
    )


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a function or a bound method takes by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return [name for name, parameter in parameters.items() if parameter.kind in named and name != "self"]


def refuse_unknown(what: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse keyword arguments that `what` does not have: a TypeError names the first, and the nearest."""
    known = set(known)
    if unknown := sorted(str(name) for name in names if name not in known):
        raise TypeError(unknown_argument(what, unknown[0], known))


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of the choices."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(cut(value), choices, 1, 0.5) if isinstance(value, str) else []
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}{hint}")
