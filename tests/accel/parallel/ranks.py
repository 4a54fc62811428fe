"""Runs a function on several ranks, processes of this machine that talk by Gloo, or GPUs by NCCL."""

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.waiting import HANG

# Whatever this machine's name resolves to.
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# Ranks are forked from a server that has imported what they need, once for all tests of a process: importing
# torch, diffusers and transformers takes seconds, and most tests are done in less.
multiprocessing.set_forkserver_preload(["tests.accel.parallel.test_combinations"])


def on_ranks(count, function, *arguments, backend="gloo"):
    """Call a module's function as each of `count` ranks, and return what each returned.

    By "nccl" each of them has a GPU of its own.

    Raises:
        AssertionError: a rank failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = f"{function.__module__}:{function.__qualname__}"
        method = "forkserver" if backend == "gloo" else "spawn"  # CUDA may not be forked
        try:
            start_processes(_be, (count, folder, name, arguments, backend), count, start_method=method)
        except Exception as error:
            tracebacks = [file.read_text() for file in Path(folder).glob("*.error")]
            raise AssertionError("\n".join(tracebacks) or str(error)) from None
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def torchrun(count):
    """Return the command that starts a script on ranks of this machine; no rank: as it would be without."""
    ranks = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    ranks += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, *(ranks if count else ())]


def environment():
    """Return the environment to start them in."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}


def _be(rank, count, folder, name, arguments, backend):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    module, _, function = name.partition(":")
    if backend == "nccl":
        os.environ["LOCAL_RANK"] = str(rank)
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=HANG),
    )
    try:
        result = getattr(importlib.import_module(module), function)(rank, *arguments)
        torch.save(result, Path(folder, f"{rank}.pt"))
        dist.barrier()  # nobody leaves while others wait for what it sent
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    # Not as Python ends otherwise: Gloo's threads may hold the last tensors still, and abort the process if
    # they let go of them while it is on its way out.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
