"""The environment variables that torchrun and similar launchers set, read without importing torch."""

import os


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return this process's rank; 0 if it is alone."""
    return int(os.environ["RANK"]) if launched() else 0


def is_first() -> bool:
    """Whether this process shows progress and writes files: the first rank, or the only process."""
    return rank() == 0
