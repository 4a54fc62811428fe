"""Muon: momentum whose matrices are made orthogonal before each step; AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace the singular values of matrices by values near one.

    Args:
        matrices: "n rows columns".
        steps: Newton-Schulz iterations.
    Returns: "n rows columns", singular values between about 0.7 and 1.2.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on matrices and convolution kernels (as output × everything else), AdamW on the rest.

    Muon's update is scaled to the size of a typical AdamW update, so one learning rate serves both.

    Args:
        matrices: weights with two or more axes.
        others: embeddings, heads, norms and biases.
        lr: learning rate of both.
        momentum: Muon's momentum (Nesterov).
        weight_decay: decoupled, on matrices only.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": group, "muon": True} for group in by_shape.values()]
        groups.append({"params": list(others), "muon": False})
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            (self._muon if group["muon"] else self._adam)(group)

    def _muon(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        # Matrices of one shape go together, "n rows columns".
        gradients = torch.stack([p.grad for p in params if p.grad is not None]).flatten(2)
        state = self.state[group["params"][0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        momentum = state["momentum"].lerp_(gradients, 1 - group["momentum"])
        update = orthogonalize(gradients.lerp(momentum, group["momentum"]))
        scale = 0.2 * max(update.shape[1:]) ** 0.5
        for p, u in zip(params, update, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.view_as(p), alpha=-group["lr"] * scale)

    def _adam(self, group: dict[str, Any], beta1: float = 0.9, beta2: float = 0.99) -> None:
        correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            mean = state["mean"].lerp_(p.grad, 1 - beta1)
            square = state["square"].lerp_(p.grad.square(), 1 - beta2)
            p.addcdiv_(mean, (square / correction2).sqrt_().add_(1e-8), value=-group["lr"] / correction1)
