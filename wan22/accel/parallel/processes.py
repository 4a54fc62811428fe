"""The processes that torchrun starts: joining, output of the first rank alone, ending."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import warnings
from types import TracebackType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from ...devices import card, has_own_memory, module_of
from .environment import is_first

Value = TypeVar("Value")
# Of collectives between devices; PyTorch chooses for others.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


def own_device() -> torch.device:
    """Return this rank's device: a GPU of its own, or the CPU where there are none."""
    kind = card()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", module_of(kind).current_device())))


def join() -> int:
    """Join the other ranks, once, and return the number of ranks; ValueError if this process is alone.

    From then on an unhandled error and Ctrl-C end this process at once, even while it waits for another rank;
    torchrun then ends the others.
    """
    if _joined():
        return dist.get_world_size()
    if "RANK" not in os.environ:
        raise ValueError("this is one process; start it with torchrun --nproc-per-node=2, for two GPUs")
    device = own_device()
    if has_own_memory(device):
        module_of(device).set_device(device)
        dist.init_process_group(_BACKENDS.get(device.type), device_id=device)
    else:
        dist.init_process_group("gloo")
    atexit.register(_leave)
    if threading.current_thread() is threading.main_thread():
        _end_at_once()
    return dist.get_world_size()


def end(code: int) -> NoReturn:
    """End this process at once: leaving the group in order could wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_silent() -> None:
    """Show progress bars, warnings and log messages of the first rank alone; errors of every rank."""
    if is_first():
        return
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def shared(value: Value) -> Value:
    """Return the first rank's value on every rank; it is pickled."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _end_at_once() -> None:
    """Let unhandled errors and Ctrl-C end the process as `end` does."""
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        end(1)

    sys.excepthook = hook
    # Python handles signals between its own instructions, but waiting for a rank may never return.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave() -> None:
    if _joined():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            # Gloo's threads may still hold tensors, and abort the process if they free them at Python's exit.
            time.sleep(0.1)
