"""What makes the models faster or smaller: attached from outside, and detached again."""

from typing import Any

__all__ = ["plan"]


def plan(*args: Any, **kwargs: Any) -> Any:
    """Find the fastest way to make a video that fits into memory; see `wan22.accel.planning.planner.plan`."""
    from .planning.planner import plan

    return plan(*args, **kwargs)
