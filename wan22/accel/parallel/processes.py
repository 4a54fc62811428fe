"""The processes that torchrun starts: how they meet, which of them speaks, how they end."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import warnings
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .environment import is_first


def own_device() -> torch.device:
    """Return the device that is this rank's: a GPU of its own, or the CPU where there are none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def join() -> int:
    """Join the other ranks, if that has not been done, and return how many there are.

    From then on an error that nobody handles, and Ctrl-C, end this process at once, in whatever it waits for;
    torchrun ends the others then.

    Raises:
        ValueError: this process is alone.
    """
    if _joined():
        return dist.get_world_size()
    if "RANK" not in os.environ:
        raise ValueError("this is one process; start it with torchrun --nproc-per-node=2, for two GPUs")
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    atexit.register(_leave)
    if threading.current_thread() is threading.main_thread():
        _end_at_once()
    return dist.get_world_size()


def end(code: int) -> NoReturn:
    """End this process without a word to the others, who may wait for it, as it may for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_silent() -> None:
    """Let only the first rank show progress of loading, and libraries' remarks; errors are everybody's."""
    if is_first():
        return
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def shared(value: Any) -> Any:
    """Return the first rank's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _end_at_once() -> None:
    """Let errors and Ctrl-C end the process as `end` does."""
    tell = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell(kind, error, trace)
        end(1)

    sys.excepthook = hook
    # Python would notice the signal when the call that waits for another rank returns, which it may not.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave() -> None:
    """Leave the other ranks, at the end of the script."""
    if _joined():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            # Gloo's threads may hold the last tensors still, and abort the process if they let go of them
            # once Python is on its way out.
            time.sleep(0.1)
