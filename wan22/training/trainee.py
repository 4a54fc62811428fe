"""One transformer in training: what is trained of it, its optimizer, and a step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checks import cut
from ..devices import has_own_memory
from .adapters import Average, attach
from .config import TrainConfig
from .data.cached import CachedClips
from .draws import generator
from .objective import losses, weights_of
from .samples import Drawing, Order, moved
from .streaming import StreamedBlocks
from .timesteps import Timesteps


@dataclass
class StepResult:
    """What a step tells."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Trainee:
    """A transformer in training.

    Args:
        slot: the pipeline's component.
        label: "high noise", "low noise", or "" for the only transformer.
        model: the transformer, on the CPU.
        config: the settings.
        timesteps: its noise levels.
    """

    def __init__(self, slot: str, label: str, model: Any, config: TrainConfig, timesteps: Timesteps) -> None:
        self.slot, self.label, self.model = slot, label, model
        self.config, self.timesteps = config, timesteps
        self.dtype = model.dtype  # that the large linear layers run in; what is trained is float32
        self.trained: dict[str, nn.Parameter] = attach(model, config)
        if config.method == "full":
            self.dtype = torch.float32
        if config.checkpointing:
            # Without dropout nothing is random, and no generator's state need be read from the device.
            keeps = config.dropout > 0
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=keeps)
            model.enable_gradient_checkpointing(again)
        self.optimizer = _optimizer(list(self.trained.values()), config)
        self.scheduler = _scheduler(self.optimizer, config)
        self.average = Average(self.trained, config.ema) if config.ema else None
        self.steps = 0
        self._streaming: StreamedBlocks | None = None

    def stream(self, device: torch.device, blocks: Sequence[int]) -> None:
        """Keep the frozen weights of some blocks on the host, but for when they compute on a device."""
        self._streaming = StreamedBlocks(self.model, device, blocks)

    def place(self, device: torch.device) -> None:
        """Move the transformer, but for what is streamed, and the optimizer's state, to a device."""
        if self._streaming is None:
            self.model.to(device)
        else:
            self._streaming.place(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:  # the step's number stays where it is
                    state[name] = value.to(device)

    def losses_of(
        self,
        clips: CachedClips,
        drawing: Drawing,
        indices: list[int],
        numbers: list[int],
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """Return the losses "b" of clips at noise levels."""
        device = next(iter(self.trained.values())).device
        batch, noise = drawing.draw(clips, indices, numbers, self.dtype)
        return losses(self.model, moved(batch, device, self.dtype), noise.to(device), sigma.to(device))

    def step(
        self,
        clips: CachedClips,
        order: Order,
        drawing: Drawing,
        process: tuple[int, int] = (0, 1),
        mean_of: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> StepResult:
        """Make one optimizer step.

        Args:
            clips, order, drawing: the data.
            process: this process's number, and how many there are: they share the step's batches.
            mean_of: returns the mean of a tensor over all processes.

        Raises: FloatingPointError: a loss is not finite.
        """
        config, (rank, count) = self.config, process
        self.model.train()
        total, parameters = torch.zeros((), dtype=torch.float64), list(self.trained.values())
        for part in range(config.accumulation):
            number = (self.steps * config.accumulation + part) * count + rank
            indices = order.batch(number)
            numbers = [number * config.batch_size + i for i in range(len(indices))]
            sigma = self.timesteps.sample(config.seed, numbers)
            with _dropout_of(config, number, parameters[0].device):
                found = self.losses_of(clips, drawing, indices, numbers, sigma)
                weights = weights_of(config.weighting, sigma, self.timesteps)
                loss = (found * weights.to(found)).mean() / config.accumulation
                loss.backward()
            total += loss.detach().double().cpu()
        if count > 1:
            _share(parameters, mean_of)
            total = mean_of(total.to(parameters[0].device)).cpu()
        if not torch.isfinite(total):
            where = f"step {self.steps + 1}" + (f", {self.label}" if self.label else "")
            raise FloatingPointError(
                f"{where}: the loss is {cut(total.item())}; a lower learning_rate may help"
            )
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.trained)
        self.steps += 1
        return StepResult(total.item(), float(norm), rate)

    # ---- what is kept of it ----

    def state(self) -> dict[str, Any]:
        """Return all that the next steps depend on, on the CPU."""
        average = self.average
        return {
            "steps": self.steps,
            "trained": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": None if average is None else {"steps": average.steps, "weights": average.weights},
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was."""
        if state["trained"].keys() != self.trained.keys():
            raise ValueError("the state is of another transformer, or of other targets")
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps = state["steps"]
        if self.average is not None:
            self.average.steps = state["average"]["steps"]
            self.average.weights = {n: w.to(self.trained[n]) for n, w in state["average"]["weights"].items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the average of its weights, if there is one."""
        if self.average is None:
            yield
            return
        before = {name: parameter.data for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.data = self.average.weights[name].to(parameter.device)
        try:
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = before[name]


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("optimizer='adamw8bit' needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(parameters, **options)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    from transformers import get_scheduler

    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, config.warmup, config.steps)


@contextmanager
def _dropout_of(config: TrainConfig, batch: int, device: torch.device) -> Iterator[None]:
    """Let dropout be that of a batch's number; the process's generators stay as they are."""
    if not config.dropout:
        yield
        return
    with torch.random.fork_rng([device] if has_own_memory(device) else []):
        torch.manual_seed(generator(config.seed, "dropout", batch).initial_seed())
        yield


def _share(parameters: list[nn.Parameter], mean_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace gradients by their mean over all processes, in one transfer."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = mean_of(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
