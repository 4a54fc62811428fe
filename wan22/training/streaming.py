"""Frozen blocks that stay on the host, and are on the device while they compute.

A training with gradient checkpointing calls each block twice: forward from the first to the last, and once
more, from the last to the first, when its gradients are computed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..accel.offload.layout import blocks_of
from ..devices import has_own_memory, module_of
from ..host_memory import available_ram

Weights = list[torch.Tensor]


class StreamedBlocks:
    """Brings the frozen weights of some blocks to the device, each as it is called, and the next one ahead.

    Two or three of them are on the device at once. Each time they are new tensors: what autograd still needs
    of a block lives until its gradients are done, and no buffer is overwritten beneath it. What is trained,
    and all blocks that are not named, stay on the device.

    Args:
        model: the transformer, with gradient checkpointing.
        device: where it is trained.
        streamed: indices of the blocks.
    """

    def __init__(self, model: nn.Module, device: torch.device, streamed: Sequence[int]) -> None:
        blocks = blocks_of(model)
        self.model, self.device, self.order = model, device, sorted(streamed)
        self._frozen = {i: [p for p in blocks[i].parameters() if not p.requires_grad] for i in self.order}
        self._host = {i: [p.data for p in frozen] for i, frozen in self._frozen.items()}
        self._ahead: dict[int, tuple[Weights, Any]] = {}
        self._bound: int | None = None
        self._stream: Any = None
        if has_own_memory(device):
            self._stream = module_of(device).Stream(device)
            self._pin()
        for i in self.order:
            blocks[i].register_forward_pre_hook(partial(self._enter, i))

    def place(self, device: torch.device) -> None:
        """Move all of the model but the streamed weights to a device; those are on the host afterwards."""
        for _, ready in self._ahead.values():
            self._await(ready)
        self._ahead.clear()
        self._leave()
        streamed = {id(parameter) for frozen in self._frozen.values() for parameter in frozen}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in streamed:
                tensor.data = tensor.data.to(device)
                if tensor.grad is not None:
                    tensor.grad.data = tensor.grad.data.to(device)

    def _enter(self, index: int, *_: Any) -> None:
        """Bind a block's weights on the device, and start to copy those of the block that is next."""
        place = self.order.index(index)
        before = self._bound
        backwards = index == self.order[-1] or (before is not None and index < before and place > 0)
        if before != index:
            self._leave()
            weights, ready = self._ahead.pop(index) if index in self._ahead else self._copied(index)
            self._await(ready)
            for parameter, tensor in zip(self._frozen[index], weights, strict=True):
                parameter.data = tensor
            self._bound = index
        following = place - 1 if backwards else place + 1
        if 0 <= following < len(self.order):
            ahead = self.order[following]
            if ahead not in self._ahead:
                self._ahead = {ahead: self._copied(ahead)}

    def _leave(self) -> None:
        if self._bound is not None:
            for parameter, tensor in zip(self._frozen[self._bound], self._host[self._bound], strict=True):
                parameter.data = tensor
            self._bound = None

    def _copied(self, index: int) -> tuple[Weights, Any]:
        """Start to copy a block's weights; return the copies, and what the device waits for."""
        host = self._host[index]
        copies = [torch.empty_like(tensor, device=self.device) for tensor in host]
        if self._stream is None:
            for copy, tensor in zip(copies, host, strict=True):
                copy.copy_(tensor)
            return copies, None
        # Their memory may have been another tensor's, of which the device has work to do yet.
        self._stream.wait_stream(module_of(self.device).current_stream(self.device))
        with module_of(self.device).stream(self._stream):
            for copy, tensor in zip(copies, host, strict=True):
                copy.copy_(tensor, non_blocking=True)
            ready = module_of(self.device).Event()
            ready.record(self._stream)
        return copies, ready

    def _await(self, ready: Any) -> None:
        if ready is not None:
            module_of(self.device).current_stream(self.device).wait_event(ready)

    def _pin(self) -> None:
        """Move the weights to pinned memory, from which copies run beside the device's work, if it fits."""
        nbytes = sum(tensor.nbytes for weights in self._host.values() for tensor in weights)
        if nbytes < 0.8 * available_ram():
            self._host = {i: [tensor.pin_memory() for tensor in ts] for i, ts in self._host.items()}
            for i, frozen in self._frozen.items():
                for parameter, tensor in zip(frozen, self._host[i], strict=True):
                    parameter.data = tensor
