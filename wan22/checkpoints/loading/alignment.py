"""Weights where the CPU's kernels want them."""

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

CPU_ALIGNMENT = 64  # bytes, as PyTorch's own allocator gives on the CPU


def align_weights(model: nn.Module | None) -> None:
    """Copy weights at unaligned addresses, in place, if the model runs on the CPU.

    Memory-mapped weights begin wherever the file's header ends, and the CPU's matrix kernels sum in another
    order at another alignment: the same bf16 weights in two files gave latents 1.4e-2 apart.
    """
    if model is None or get_module_execution_device(model).type != "cpu":
        return
    for tensor in (*model.parameters(), *model.buffers()):
        # Quantised weights are tensors of other classes, with kernels of their own.
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.data_ptr() % CPU_ALIGNMENT:
            tensor.data = tensor.data.clone()
