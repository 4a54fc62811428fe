"""Bars that diffusers and transformers draw of loading: in terminals, not in files."""

import sys

import pytest
from diffusers.utils import logging as of_diffusers
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from wan22 import WanT2VPipeline, tiny_checkpoint
from wan22.progress import loading_bars

pytestmark = pytest.mark.skipif(
    constants.HF_HUB_DISABLE_PROGRESS_BARS is not None, reason="an environment variable holds the bars"
)


@pytest.fixture(autouse=True)
def enabled():
    """Let them be as at a process's start, also afterwards."""
    yield
    enable_progress_bars()


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_drawn_in_terminals_only(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"))
    assert ("Loading pipeline components" in capsys.readouterr().err) == terminal
    assert of_diffusers.is_progress_bar_enabled() and not are_progress_bars_disabled()


def test_bars_that_somebody_has_switched_off_stay_off(capsys):
    disable_progress_bars()
    with loading_bars():
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled()
