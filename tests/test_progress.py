"""Bars of bytes: with their speed, only where something is to be seen."""

import io
import time

import pytest

from wan22.progress import advance, bytes_bar

pytestmark = pytest.mark.usefixtures("bars_are_wanted")


def told(seconds=0.0, total=4_000_000, **options):
    """What a bar writes while two halves of its bytes come."""
    out = io.StringIO()
    with bytes_bar(total, "loading", file=out, **{"disable": False} | options):
        for _ in range(2):
            advance(total // 2)
            time.sleep(seconds)
            advance(0)
    return out.getvalue()


def test_bytes_and_speed():
    text = told(delay=0)
    assert "loading: 100%" in text and "4.00M/4.00M" in text and "B/s" in text


def test_work_of_less_than_a_second_shows_nothing():
    assert told() == ""
    assert "loading: 100%" in told(seconds=0.6)


def test_output_that_is_no_terminal_has_no_bar():
    assert told(delay=0, disable=None) == ""


def test_nothing_to_convert():
    assert told(delay=0, total=0) == ""


@pytest.mark.parametrize(
    ("name", "quiet"),
    [
        ("diffusers.utils.logging.is_progress_bar_enabled", False),
        ("huggingface_hub.utils.are_progress_bars_disabled", True),  # HF_HUB_DISABLE_PROGRESS_BARS=1
    ],
)
def test_silence_that_was_asked_of_the_libraries(name, quiet, monkeypatch):
    assert told(delay=0) != ""
    monkeypatch.setattr(name, lambda: quiet)
    assert told(delay=0) == ""


def test_without_a_bar_nothing_is_counted():
    advance(1)
    with bytes_bar(2, "a", disable=False, file=io.StringIO()) as bar:
        advance(1)
    advance(1)
    assert bar.n == 1
