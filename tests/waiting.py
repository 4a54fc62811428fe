"""Waits for what a test needs, however busy the machine is."""

import time

# Seconds after which a test is taken to hang: far beyond what anything takes, so it decides nothing else.
HANG = 900


def until(condition):
    """Wait until a condition holds.

    Raises:
        AssertionError: it did not within `HANG` seconds.
    """
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {HANG} s"
        time.sleep(0.01)
