"""Checks of plain arguments say what is wrong, and what would be right."""

import ast
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import wan22
from wan22 import checks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recipe", "the call: recipe is called distilled now"),
        ("num_frame", "the call has no argument num_frame; the nearest is num_frames"),
        ("x\x1b", r"the call has no argument x\x1b; it has distilled, num_frames"),
    ],
)
def test_an_argument_that_does_not_exist(name, message):
    assert checks.unknown_argument("the call", name, ["num_frames", "distilled"]) == message
    assert checks.unknown_argument("a", "recipe", ["fit"]) == "a has no argument recipe; it has fit"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zoom", "fit='zoom' must be one of 'crop', 'pad'"),
        ("crops", "fit='crops' must be one of 'crop', 'pad'; the nearest is 'crop'"),
        (None, "fit=None must be one of 'crop', 'pad'"),
        ([], r"fit=\[\] must be one of 'crop', 'pad'"),
    ],
)
def test_choices(value, message):
    checks.check_choice("fit", "crop", ("crop", "pad"))
    with pytest.raises(ValueError, match=f"^{message}$"):
        checks.check_choice("fit", value, ("crop", "pad"))


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (0, {}, "n=0 must be an int, at least 1; the nearest is 1"),
        (True, {}, "n=True must be an int, at least 1; such as 1"),
        ("2", {}, "n='2' must be an int, at least 1; such as 1"),
        (3.6, {}, "n=3.6 must be an int, at least 1; the nearest is 4"),
        (float("nan"), {}, "n=nan must be an int, at least 1; such as 1"),
        (9, {"most": 2}, "n=9 must be an int, 1 to 2; the nearest is 2"),
        (1, {"least": 2}, "n=1 must be an int, at least 2; the nearest is 2"),
    ],
)
def test_counts(value, options, message):
    checks.check_positive_int("n", np.int64(2), **options)
    with pytest.raises(ValueError, match=f"^{message}$"):
        checks.check_positive_int("n", value, **options)


def test_whole_numbers_of_any_library():
    for value in (3, np.int32(3), np.array(3), torch.tensor(3)):
        assert checks.as_number(value) == 3 and type(checks.as_number(value)) is int
    for value in (0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert checks.as_number(value) == 0.5 and type(checks.as_number(value)) is float
    for value in (True, np.True_, torch.tensor(True), "3", None, [3], np.array([3]), 1j, np.complex64(1)):
        assert checks.as_number(value) is value
    plain = checks.with_plain_numbers({"a": (np.int64(1), [torch.tensor(2.5)]), "b": True})
    assert plain == {"a": (1, [2.5]), "b": True} and type(plain["a"][0]) is int and plain["b"] is True


BAD = [0, -1, 1, 2, 3, 5, 7, 17, 80, 4096, 4097, 2**63, 2**63 - 1, 10**40, -(10**5000)]
BAD += [0.4, 2.5, -3.5, 1e30, float("nan"), float("inf"), -float("inf"), True, False, None, "7", "x" * 10**5]
BAD += [np.int64(-4), np.float32(9.5), np.array(3), torch.tensor(5.5), torch.tensor(True), [1], (2, 3), {}]
COUNTS = [{}, {"least": 0}, {"least": 256}, {"most": 2}, {"least": 2, "most": 3}]
COUNTS += [{"least": 0, "most": 2**63 - 1}]
RANGES = [{}, {"least": 0, "most": 1}, {"least": 1}, {"least": -2, "most": -1.5}]
CHECKS = {
    **{f"count {o}": partial(checks.check_positive_int, "n", **o) for o in COUNTS},
    **{f"real {o}": partial(checks.check_real, "n", **o) for o in RANGES},
    **{f"size {m}": partial(checks.check_size, "n", multiple=m) for m in (1, 8, 32)},
    **{f"frames {s}": partial(checks.check_num_frames, stride=s) for s in (1, 4)},
    "bytes": partial(checks.parse_bytes, name="n"),
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.mark.parametrize("name", CHECKS)
def test_what_a_hint_names_is_accepted(name):
    check, refused = CHECKS[name], 0
    for value in BAD:
        try:
            check(value)
            continue
        except ValueError as error:
            message = str(error)
        refused += 1
        assert len(message) < 600
        hint = message.rpartition("; ")[2]
        if "bits" in hint or ("nearest" not in hint and "such as" not in hint):
            continue
        numbers = NUMBER.findall(hint)
        assert numbers, message
        for text in numbers:
            check(float(text) if "." in text or "e" in text else int(text))
    assert refused > 5


LONG = ["x" * 10**6, b"x" * 10**6, ["x" * 1000] * 1000, {str(i): "x" * 1000 for i in range(1000)}, 10**20000]
LONG += [[[["x" * 500] * 50] * 50] * 50, tuple(range(10**5)), set(range(10**5)), torch.zeros(100, 100)]
LONG += [np.zeros(10**5), Path("x" * 10**5), type("Long", (), {"__repr__": lambda self: "x" * 10**6})()]


@pytest.mark.parametrize("value", LONG, ids=lambda value: type(value).__name__)
def test_what_a_message_shows_of_a_value_is_short(value):
    assert len(checks.shown(value)) <= checks.LONGEST
    if not isinstance(value, int):
        assert len(checks.cut(value)) <= checks.LONGEST
    with pytest.raises(ValueError) as error:
        checks.check_choice("fit", value, ("crop", "pad"))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("value", [0, -16, 40, 32.0, True, "32", float("inf")])
def test_sizes(value):
    checks.check_size("width", 48, 16)
    with pytest.raises(ValueError, match=r"width=.* must be an int, a positive multiple of 16; "):
        checks.check_size("width", value, 16)


@pytest.mark.parametrize("value", [0, -3, 80, 81.0, True, None])
def test_frame_counts(value):
    for count in (1, 5, 81):
        checks.check_num_frames(count, 4)
    with pytest.raises(ValueError, match=r"num_frames=.* must be an int, 1 \+ a multiple of 4; "):
        checks.check_num_frames(value, 4)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("12GB", 12e9),
        ("11.5 GiB", 11.5 * 2**30),
        ("800mb", 8e8),
        (5, 5),
        (1.6e9, 1.6e9),
        ("1e+9", 1e9),
        (1e16, 1e16),
        ("24G", 24e9),
        ("2Ki", 2048),
        ("7B", 7),
        ("1.5GB/s", 1.5e9),
    ],
)
def test_amounts(amount, expected):
    assert checks.parse_bytes(amount) == expected


@pytest.mark.parametrize("amount", ["much", "12GX", "0", 0, 0.5, "-3GB", "", "3I", "1.2.3GB", "nan", None])
def test_no_amounts(amount):
    with pytest.raises(ValueError, match=r"vram=.* must be at least one byte, written as '12GB'"):
        checks.parse_bytes(amount, "vram")


def test_no_message_writes_a_value_out_whole():
    """Errors and log lines show values by `shown`, which bounds them, and not by their repr."""
    for path in Path(wan22.__file__).parent.rglob("*.py"):
        if path.name in ("__init__.py", "checks.py"):  # names that somebody looks up
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
                value = node.value
                cut_before = isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice)
                constant = isinstance(value, ast.Name) and value.id.isupper()
                assert cut_before or constant, f"{path.name}:{node.lineno}: {ast.unparse(value)}"
