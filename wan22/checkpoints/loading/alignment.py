"""Weights where the CPU's kernels want them."""

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from ...private_apis import accelerate_hook, own_tensors
from ..deferred import settle

CPU_ALIGNMENT = 64  # bytes, as PyTorch's own allocator gives on the CPU


def is_aligned(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether a module's weight on the CPU can be computed with where it lies.

    Memory-mapped weights begin wherever the file's header ends, and the CPU's matrix kernels sum in another
    order at another alignment: the same bf16 weights in two files gave latents 1.4e-2 apart. An embedding's
    rows are only looked up.
    """
    if type(tensor) not in (nn.Parameter, torch.Tensor):  # of another class, with kernels of its own
        return True
    return isinstance(module, nn.Embedding) or not tensor.data_ptr() % CPU_ALIGNMENT


def unaligned_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights on the CPU that are not aligned, of which `align_weights` makes copies."""
    tensors = [(module, t) for module in model.modules() for own in own_tensors(module) for t in own.values()]
    found = [t for module, t in tensors if t is not None and t.is_cpu and not is_aligned(module, t)]
    return list({id(tensor): tensor for tensor in found}.values())


def align_weights(model: nn.Module | None) -> None:
    """Copy weights that are not aligned, and convert deferred ones, in place; both for good.

    Nothing is done to a model that does not run on the CPU, or whose weights something else moves.
    """
    if model is None or get_module_execution_device(model).type != "cpu":
        return
    if getattr(accelerate_hook(model), "streamer", None) is None:
        settle(model)
        for tensor in unaligned_weights(model):
            tensor.data = tensor.data.clone()
