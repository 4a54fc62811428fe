"""The device beside the host, of whatever make: what there is of it, and results that do not stall it.

`torch.accelerator` answers what it knew in PyTorch 2.6. Of memory it knew nothing then; the module of the
device's own, torch.cuda or torch.xpu, does.
"""

from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch

# Without memory of their own: nothing is moved to them, and their copies end before they return.
_IN_HOST_MEMORY = ("cpu", "mps", "meta")
# From here on Triton converts float8 numbers; NVIDIA's of capability 8.0 have none.
_FLOAT8 = (8, 9)
T = TypeVar("T")


def card() -> torch.device | None:
    """Return the device type with memory of its own, "cuda" (ROCm's, too), "xpu" or "npu"; None: none."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None or found.type in _IN_HOST_MEMORY else found


def has_own_memory(device: torch.device) -> bool:
    """Whether tensors have to be copied to a device, which computes beside the host."""
    return device.type not in _IN_HOST_MEMORY


def module_of(device: torch.device) -> Any:
    """Return PyTorch's module for a device type, such as torch.cuda, with streams, events and memory."""
    return torch.get_device_module(device)


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Return a device's bytes that nobody has taken, and all of them."""
    module = module_of(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        return int(free), int(total)
    total = int(module.get_device_properties(device).total_memory)  # of XPU, in PyTorch 2.6
    return total - int(module.memory_reserved(device)), total


def name_of(device: torch.device) -> str:
    """Return a device's name as its maker has it; of the CPU and MPS, "cpu" and "mps"."""
    return str(module_of(device).get_device_name(device) if has_own_memory(device) else device)


def is_rocm(device: torch.device) -> bool:
    """Whether a device is AMD's, which PyTorch calls "cuda" as well."""
    return device.type == "cuda" and torch.version.hip is not None


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return a GPU's compute capability; None: it is not NVIDIA's, whose numbers mean something else."""
    if device.type != "cuda" or is_rocm(device):
        return None
    return torch.cuda.get_device_capability(device)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has a compiler for a device: GPUs need Triton, which Windows comes without."""
    return not has_own_memory(device) or find_spec("triton") is not None


@torch.compiler.assume_constant_result
def compiles_float8(device: torch.device) -> bool:
    """Whether compiled code can convert float8 numbers: Triton has no such type on older GPUs."""
    found = capability(device)
    return device.type in ("cpu", "meta") or (found is not None and found >= _FLOAT8)


def uploaded(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers, nested in tuples as for torch.tensor, on a device; the host does not wait for it."""
    tensor = torch.tensor(values, dtype=dtype)
    if not has_own_memory(device):
        return tensor.to(device)
    # PyTorch keeps pinned memory until what was queued from it has come.
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopies(Generic[T]):
    """Copies of tensors to the host, in order, each of which is waited for once the next one is queued.

    So the device always has work while the host waits. On the CPU, and on devices that copy in no other way
    than at once, nothing is on its way, and each is there as soon as it is put in.

    Args:
        device: the tensors' device.
    """

    def __init__(self, device: torch.device) -> None:
        self._in_background = has_own_memory(device)
        self._queue: deque[tuple[T, tuple[torch.Tensor, ...], torch.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, what: T, *tensors: torch.Tensor) -> None:
        """Queue a copy of tensors, of which `what` says what they are."""
        if not self._in_background:
            self._queue.append((what, tuple(tensor.cpu() for tensor in tensors), None))
            return
        # PyTorch pins the memory, and keeps it for the next copy once the tensor is gone.
        copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        event = torch.accelerator.current_stream(tensors[0].device).record_event()
        self._queue.append((what, copies, event))

    def arrived(self) -> Iterator[tuple[T, tuple[torch.Tensor, ...]]]:
        """Yield what can be read without stalling the device: all but the one that was put in last."""
        while len(self._queue) > (1 if self._in_background else 0):
            yield self._next()

    def rest(self) -> Iterator[tuple[T, tuple[torch.Tensor, ...]]]:
        """Yield all that is left; the device may have nothing else to do meanwhile."""
        while self._queue:
            yield self._next()

    def _next(self) -> tuple[T, tuple[torch.Tensor, ...]]:
        what, copies, event = self._queue.popleft()
        if event is not None:
            event.synchronize()
        return what, copies
