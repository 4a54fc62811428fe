"""Which tests are in the slow tier."""

import pytest


def slow(values):
    """Mark values of a parameter, whose tests `make test-slow` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
