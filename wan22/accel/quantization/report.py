"""What quantising did to a model: errors of its layers and of its output, and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from ...checkpoints.loading.models import is_ours
from ...checkpoints.quantized_linear import QuantizedLinear
from ...private_apis import uncompiled
from ..offload.layout import blocks_of, bytes_of
from .layers import is_quantized_layer, linears_of, plain_blocks
from .settings import in_words


@dataclass(frozen=True)
class Report:
    """What quantising did to a model; errors are relative, in the L2 norm."""

    layers: Mapping[str, float]  # error of each layer's weight, by name
    block: float  # error of the output of the first block that is quantised
    output: float  # error of the model's output
    bytes_before: int  # size of the plain model's parameters and buffers
    bytes_after: int
    first: int = 0  # number of that block
    kept: str = ""  # numbers of the blocks in full precision, "0, 39"

    def __str__(self) -> str:
        errors = sorted(self.layers.values())
        worst = max(self.layers, key=lambda name: self.layers[name])
        share = self.bytes_after / self.bytes_before
        return "\n".join(
            (
                f"weights  {errors[len(errors) // 2]:.1e} relative error, median of {len(errors)} layers",
                f"         {errors[-1]:.1e} at most, {worst}",
                f"{f'block {self.first}':8} {self.block:.1e}",
                f"output   {self.output:.1e}",
                f"bytes    {self.bytes_before / 1e9:.3f} GB -> {self.bytes_after / 1e9:.3f} GB, {share:.2f}",
                *([f"kept     blocks {self.kept}"] if self.kept else []),
            )
        )


@torch.no_grad()
def report(
    plain: nn.Module,
    quantized: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    size: tuple[int, int, int] = (3, 16, 16),
    tokens: int = 64,
) -> Report:
    """Compare a model with its quantised copy, and print the report.

    Args:
        plain: the model as it was: loaded again, or copied before quantising.
        quantized: the quantised model.
        inputs: arguments of the models' forward; None: random ones.
        size: latent frames, rows and columns of random latents.
        tokens: number of random text tokens.

    Raises: ValueError: no layer of the second model is quantised.
    """
    plain, quantized = (uncompiled(model) for model in (plain, quantized))
    inputs = _random_inputs(plain, size, tokens) if inputs is None else inputs
    others = dict(linears_of(quantized))
    layers = {
        name: _relative(_values(others[name]), _values(layer))
        for name, layer in linears_of(plain)
        if is_quantized_layer(others[name])
    }
    if not layers:
        raise ValueError(f"no layer of the second {type(quantized).__name__} is quantised")
    kept = plain_blocks(quantized)
    first = next(i for i in range(len(kept) + 1) if i not in kept)
    block, output = zip(_outputs(plain, inputs, first), _outputs(quantized, inputs, first), strict=True)
    error, whole = (_relative(found, expected) for expected, found in (block, output))
    found = Report(layers, error, whole, bytes_of(plain), bytes_of(quantized), first, in_words(kept))
    print(found)
    return found


def _values(layer: nn.Linear) -> torch.Tensor:
    if isinstance(layer, QuantizedLinear):
        return layer.values()
    return (layer.weight.dequantize() if is_quantized_layer(layer) else layer.weight).float()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return ((found.float().to(expected.device) - expected).norm() / expected.norm()).item()


def _outputs(model: Any, inputs: Mapping[str, Any], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of one of a model's blocks and of itself."""
    device, seen = get_module_execution_device(model), []
    hook = blocks_of(model)[number].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        out = model(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()})[0]
    finally:
        hook.remove()
    first = seen[0]
    return (first[0] if isinstance(first, tuple) else first).cpu(), out.cpu()


def _random_inputs(model: Any, size: tuple[int, int, int], tokens: int) -> dict[str, torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    if hasattr(config, "vocab_size"):
        ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text = torch.randn(1, tokens, config.text_dim, generator=generator)
    latents = torch.randn(1, config.in_channels, *size, generator=generator)
    inputs = {
        "hidden_states": latents if is_ours(model) else latents.to(model.dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text.to(model.dtype),
    }
    if config.image_dim is not None:
        pair = config.pos_embed_seq_len
        shape = (1, 257, config.image_dim) if pair is None else (2, pair // 2, config.image_dim)
        image = torch.randn(shape, generator=generator).to(model.dtype)
        inputs["encoder_hidden_states_image"] = image
    return inputs
