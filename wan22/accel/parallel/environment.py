"""What torchrun, or what does as it does, tells each process that it starts; known without any library."""

import os


def launched() -> bool:
    """Whether this process was started beside others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return this process's place among them."""
    return int(os.environ["RANK"]) if launched() else 0


def is_first() -> bool:
    """Whether this process is the one that speaks and writes: the first of them, or the only one."""
    return rank() == 0
