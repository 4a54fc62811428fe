"""Random changes of bytes and of JSON documents, as strategies of hypothesis."""

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import strategies as st

_TEXTS = (
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "\x1b[31mred",
    "[bold]x",
    "a\nb",
    "%s{0}",
    "\ud800",
    "x" * 5000,
    "٣",
)
_NUMBERS = (0, -1, 1, 10**9, 2**31, 2**63, 10**30, 0.0, -0.0, 1e-300, 1e300, float("nan"), float("inf"))
_LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from(_NUMBERS)
    | st.integers(-4, 300)
    | st.floats()
    | st.sampled_from(_TEXTS)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)

Change = Callable[[bytes], bytes]


def _places(document: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value in a document."""
    keys: Iterable[Any] = ()
    if isinstance(document, dict | list):
        keys = document if isinstance(document, dict) else range(len(document))
    return [place, *(inner for key in keys for inner in _places(document[key], (*place, key)))]


@st.composite
def documents(draw: Any, document: Any) -> bytes:
    """Return a JSON document of which one or two values are replaced, left out or added, or that is deep."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(_places(changed)))
        value, how = draw(VALUES), draw(st.sampled_from(("replace", "replace", "delete", "add")))
        if not place:
            changed = value if how == "replace" else changed
            continue
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        if how == "delete":
            del parent[place[-1]]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(_TEXTS) | st.text(max_size=6))] = value
        else:
            parent[place[-1]] = value
        if not isinstance(changed, dict | list):
            break
    text = json.dumps(changed)
    if draw(st.integers(0, 30)) == 0:
        text = text.replace("1", "[" * 10**5, 1)
    return text.encode()


@st.composite
def damages(draw: Any, parts: list[tuple[int, int]], cut: bool = True) -> Change:
    """Return a function that changes some bytes within parts of a file, or cuts it off."""
    start, end = draw(st.sampled_from(parts))
    places = draw(
        st.lists(st.tuples(st.integers(start, end - 1), st.integers(0, 255)), min_size=1, max_size=6)
    )
    length = draw(st.integers(0, parts[-1][1])) if cut and draw(st.integers(0, 9)) == 0 else None

    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        for place, value in places:
            changed[place] = value
        return bytes(changed[:length])

    return damaged
