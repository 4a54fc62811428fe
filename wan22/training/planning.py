"""The memory that a training takes, by arithmetic, and which blocks are streamed within a budget.

Shapes: b samples, c channels, t h w latent frames, rows, columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..accel.offload.layout import blocks_of
from ..accel.planning.meta_models import meta_copy
from ..accel.planning.trace import peak_bytes
from ..presets import MAX_TEXT_TOKENS
from .config import TrainConfig
from .objective import Batch, losses

# Copies of what is trained: itself, its gradients, AdamW's two moments, and a temporary one of its step.
COPIES, COPIES_8BIT = 5, 2.75
AT_ONCE = 3  # streamed blocks that are on the device: the one that computes, the next, and the last one's


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of the device that a transformer's training takes.

    Args:
        frozen: frozen weights on the device, those of streamed blocks that are there at once included.
        trained: what is trained, with gradients and the optimizer's state.
        activations: what one batch takes beyond that.
        streamed: indices of the blocks whose frozen weights stay on the host.
    """

    frozen: int
    trained: int
    activations: int
    streamed: tuple[int, ...] = ()

    @property
    def peak(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations

    def __str__(self) -> str:
        parts = f"frozen weights {self.frozen / 1e9:.2f}, trained {self.trained / 1e9:.2f}"
        blocks = f"; {len(self.streamed)} blocks are streamed" if self.streamed else ""
        return f"{self.peak / 1e9:.2f} GB: {parts}, activations {self.activations / 1e9:.2f}{blocks}"


def plan_training(
    model: Any,
    trained: Mapping[str, nn.Parameter],
    config: TrainConfig,
    shape: tuple[int, int, int, int],
    text_width: int,
    budget: int | None = None,
) -> TrainingPlan:
    """Plan the training of a transformer, what is trained being attached.

    Args:
        model: the transformer.
        trained: its parameters that are trained, by name.
        config: the settings.
        shape: of the largest clip's latents, "c t h w".
        text_width: of a text token.
        budget: bytes of the device; None: whatever it takes, with nothing streamed.

    Raises: ValueError: nothing fits into the budget.
    """
    copies = COPIES if config.optimizer == "adamw" else COPIES_8BIT
    ours = {id(parameter) for parameter in trained.values()}
    own = sum(parameter.nbytes for parameter in trained.values())
    kept = round(copies * own) + (own if config.ema else 0)
    activations = activation_bytes(model, trained, config, shape, text_width)
    each = [sum(p.nbytes for p in b.parameters() if id(p) not in ours) for b in blocks_of(model)]
    frozen = sum(p.nbytes for p in model.parameters() if id(p) not in ours)
    plan = TrainingPlan(frozen, kept, activations)
    if budget is None or plan.peak <= budget:
        return plan
    if not config.checkpointing:
        raise ValueError(
            f"memory={budget / 1e9:.3g} GB is too little: it takes {plan}; with checkpointing, blocks can be "
            "streamed"
        )
    for count in range(AT_ONCE + 1, len(each) + 1):
        streamed = _spread(count, len(each))
        saved = sum(each[i] for i in streamed) - AT_ONCE * max(each)
        plan = TrainingPlan(frozen - saved, kept, activations, streamed)
        if plan.peak <= budget:
            return plan
    raise ValueError(
        f"memory={budget / 1e9:.3g} GB is too little: with all blocks streamed it takes {plan}; a smaller "
        "batch_size, rank or clip takes less"
    )


def _spread(count: int, blocks: int) -> tuple[int, ...]:
    """Return so many indices, evenly over the blocks, so that copies run beside resident blocks' work."""
    return tuple(sorted({(2 * i + 1) * blocks // (2 * count) for i in range(count)}))


def activation_bytes(
    model: Any,
    trained: Mapping[str, nn.Parameter],
    config: TrainConfig,
    shape: tuple[int, int, int, int],
    text_width: int,
) -> int:
    """Return the bytes that a batch takes beyond weights, gradients of weights included once.

    Two and three blocks are traced on the meta device: every further one keeps as much as the third does.
    """
    two, three = (
        peak_bytes(partial(_step, _copy(model, trained, blocks), config, shape, text_width), gradients=True)
        for blocks in (2, 3)
    )
    return two + (len(blocks_of(model)) - 2) * (three - two)


def _copy(model: Any, trained: Mapping[str, nn.Parameter], blocks: int) -> Any:
    copy = meta_copy(model, blocks)
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return copy.train()


def _step(model: Any, config: TrainConfig, shape: tuple[int, int, int, int], text_width: int) -> None:
    empty = partial(torch.empty, device="meta")
    c, *sizes = shape
    extra = model.config.in_channels - c
    b = config.batch_size
    dtype = model.condition_embedder.text_embedder.linear_1.bias.dtype
    batch = Batch(
        empty(b, c, *sizes),
        empty(b, MAX_TEXT_TOKENS, text_width, dtype=dtype),
        empty(b, extra, *sizes) if extra else None,
    )
    losses(model, batch, empty(b, c, *sizes), empty(b, dtype=torch.float64)).mean().backward()
