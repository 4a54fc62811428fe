"""What the training scripts share: options, learning rate, weight averaging, checkpoints, prefetching."""

from __future__ import annotations

import argparse
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def arguments(description: str | None, *flags: str, **defaults: Any) -> argparse.Namespace:
    """Parse the command line; start the group of processes if torchrun runs the script.

    Args:
        description: first words of the help text.
        flags: which of "resume", "smoke" and "conditions" the script has.
        defaults: further options and their default values; a value's type is the option's.
    Returns: the options.
    """
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training's files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    helps = {
        "resume": "go on from the last checkpoint in --out",
        "smoke": "a few steps, to see that all runs",
        "conditions": "encode the clips' first and last frames, too",
    }
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=helps[flag])
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 50) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine from start to end."""
    rate = end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * min(1.0, (step + 1) / warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use one learning rate in all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def rank() -> int:
    """Return this process's number among those that train together; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_others() -> None:
    """Return when all processes that train together have come here, and so have written their files."""
    if workers() > 1:
        dist.barrier()


def share_gradients(model: nn.Module) -> None:
    """Replace the gradients by their mean over all processes that train together."""
    if workers() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(
        gradients, (flat / workers()).split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


class Average:
    """Exponential moving average of a model's weights, with a shorter memory at the start.

    Args:
        model: whose weights to follow.
        decay: share of the old average kept at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: w.detach().clone() for name, w in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights."""
        self.steps += 1
        keep = min(self.decay, self.steps / (self.steps + 9))
        for name, w in model.state_dict().items():
            self.weights[name].lerp_(w, 1 - keep)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a run that is killed meanwhile leaves the previous one intact."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`."""
    return torch.load(path, map_location="cpu", weights_only=True)


def prefetch(make: Callable[[], T], depth: int = 4) -> Iterator[T]:
    """Yield make() for ever, computed ahead in a thread."""
    ready: queue.Queue[T] = queue.Queue(depth)

    def fill() -> None:
        while True:
            ready.put(make())

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield ready.get()
