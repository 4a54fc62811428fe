"""The phases of a call, and what is said when memory runs out in one of them."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...checks import cut
from ...devices import free_and_total, has_own_memory, module_of
from ...host_memory import available_ram

GB = 1e9
# PyTorch's allocator of the host raises a RuntimeError without a type of its own.
_HOST = ("can't allocate memory", "not enough memory")


@contextmanager
def phase(pipe: Any, what: str, size: Mapping[str, Any]) -> Iterator[None]:
    """Say, where memory runs out, in which phase that was, what was taken, and what would fit.

    The phase's tensors are freed, and the device is left as between calls. No function of the caller's runs
    within: what it raises is raised as it is.

    Args:
        pipe: the pipeline.
        what: what it does, such as "decoding".
        size: height, width and num_frames of the call, and videos.

    Raises:
        torch.OutOfMemoryError: in place of a device's, or of what the host's allocator raises.
        MemoryError: likewise.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        told = cut(next(iter(str(error).splitlines()), "") or type(error).__name__)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            sign in told for sign in _HOST
        ):
            raise
        taken = _taken(pipe, error)
        kind = MemoryError if isinstance(error, MemoryError) else torch.OutOfMemoryError
        # The frames that are left would keep their tensors as long as the error is kept.
        traceback.clear_frames(error.__traceback__)
        pipe.maybe_free_model_hooks()
        message = f"memory ran out while {what}: {told}; {taken}; {_what_fits(pipe, size)}"
        raise kind(message) from error


def _taken(pipe: Any, error: BaseException) -> str:
    """Return what was taken when memory ran out, and of how much."""
    device = pipe._execution_device
    if has_own_memory(device) and not isinstance(error, MemoryError):
        free, total = free_and_total(device)
        mine = module_of(device).memory_allocated(device)
        return (
            f"{mine / GB:.2f} of {total / GB:.2f} GB were taken by tensors here, {free / GB:.2f} GB were free"
        )
    return f"{available_ram() / GB:.2f} GB of the host's memory were free"


def _what_fits(pipe: Any, size: Mapping[str, Any]) -> str:
    from ...accel.planning.planner import plan

    device = pipe._execution_device
    try:
        found = plan(pipe, **size, device=device)
    except (
        ValueError,
        RuntimeError,
        MemoryError,
    ) as error:  # nothing fits, and what would; or no room to plan
        return cut(next(iter(str(error).splitlines()), ""))
    before = pipe.memory_plan
    if before is not None and found.device_peak >= before.device_peak:
        return f"the plan counts on {_peak(before)}, and less was free; pipe.fit() with less leaves more room"
    return f"pipe.fit() finds a plan that takes {_peak(found)}"


def _peak(plan: Any) -> str:
    where = "device" if plan.machine.has_device else "host"
    return f"{plan.device_peak / GB:.2f} GB of the {where}'s memory"
