"""What is trained of a transformer: a LoRA's matrices in float32, or, of small models, all weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..accel.offload.layout import blocks_of
from ..checkpoints.lora.injecting import lora_layers
from ..checks import listed, shown
from .config import TrainConfig

ADAPTER = "default"  # the name that PEFT gives


def targets_of(model: nn.Module, config: TrainConfig) -> list[str]:
    """Return the names of the linear layers that get matrices.

    Raises: ValueError: there is none.
    """
    blocks, pattern = {id(block) for block in blocks_of(model)}, re.compile(config.pattern)
    names = []
    for path, block in model.named_modules():
        if id(block) in blocks:
            linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            names += [f"{path}.{name}" for name in linears if pattern.fullmatch(name)]
    if not names:
        some = listed(
            {n for b in blocks_of(model)[:1] for n, m in b.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ValueError(f"targets={shown(config.targets)} fits no layer; layers are named like {some}")
    return names


def attach(model: Any, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Freeze a transformer, put in what is trained, and return that by name.

    Trained weights are float32, whatever the frozen ones are: a step is smaller than what bfloat16 resolves.
    They are drawn from the config's seed.
    """
    if config.method == "full":
        model.to(torch.float32)
        return dict(model.requires_grad_(True).named_parameters())
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model.add_adapter(_peft_config(config, targets_of(model, config)), ADAPTER)
    trained: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(model).items():
        if config.method == "lora":
            _keep_inputs(layer)
        for part in layer.adapter_layer_names:
            held = getattr(layer, part)
            if ADAPTER in held:
                whole: nn.Module = held if isinstance(held, nn.ParameterDict) else held[ADAPTER]
                for name, parameter in whole.named_parameters():
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(True)
                    trained[f"{path}.{part}.{name}"] = parameter
    return trained


class MasterLinear(nn.Linear):
    """A linear layer that computes in its input's dtype, with weights that are kept in float32.

    PEFT's LoRA layers would convert the input instead, and autograd would keep a float32 copy of it for each.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map "… i" to "… o", in the input's dtype."""
        return F.linear(input, self.weight.to(input.dtype))


def _keep_inputs(layer: Any) -> None:
    """Let one of PEFT's LoRA layers compute in its input's dtype."""
    layer.cast_input_dtype_enabled = False
    for part in (layer.lora_A, layer.lora_B):
        plain = part[ADAPTER]
        part[ADAPTER] = MasterLinear(plain.in_features, plain.out_features, bias=False, device="meta")
        part[ADAPTER].weight = plain.weight


def _peft_config(config: TrainConfig, targets: list[str]) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    rank = config.rank
    # PEFT's alphas of LoRAs are whole numbers by their annotation alone.
    alpha: Any = rank if config.alpha is None else config.alpha
    if config.method in ("loha", "lokr"):
        cls = LoHaConfig if config.method == "loha" else LoKrConfig
        return cls(r=rank, alpha=alpha, module_dropout=config.dropout, target_modules=targets)
    dora = config.method == "dora"
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=config.dropout, use_dora=dora, target_modules=targets
    )


class Average:
    """An exponential moving average of trained weights, with a shorter memory at the start.

    Args:
        weights: the weights, by name.
        decay: share of the average that is kept at each step.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Move the average towards the weights."""
        self.steps += 1
        keep = min(self.decay, self.steps / (self.steps + 9))
        for name, weight in weights.items():
            self.weights[name].lerp_(weight.detach().to(self.weights[name]), 1 - keep)
