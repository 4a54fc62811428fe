"""torch.compile of what repeats: the transformer's block, once for all layers and both experts; VAE chunks.

What is compiled lies inside of what hooks on the blocks do, so that offloading and step caches stay outside.
"""

import logging
import time
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import callback_handler

from ..models.autoencoder import AutoencoderKLWan
from ..models.transformer import WanTransformerBlock

logger = logging.getLogger(__name__)

# Methods of the VAE that are compiled: one step through a clip.
_CHUNKS = ("encode_chunk", "decode_chunk")


class Compiled:
    """Compiled functions in the place of a transformer's blocks' forward and of a VAE's chunks.

    A function is compiled at its first call, and once more for its first call with filled caches; then for
    another size of video, and with variable sizes for a third; and when a LoRA's strength first changes.
    Other prompts and the other expert use what there is. `seconds` tells how long compiling took.

    Args:
        transformers: whose blocks are compiled, all by one function.
        vae: whose chunks are compiled, too; or None.
        **options: of torch.compile.

    Raises:
        ValueError: a block's forward is replaced already, by a step cache say.
    """

    def __init__(
        self, transformers: Iterable[nn.Module], vae: AutoencoderKLWan | None = None, **options: Any
    ) -> None:
        self.seconds = 0.0
        self._started = 0.0
        options = {"fullgraph": True} | options
        blocks = [
            module
            for model in transformers
            for module in model.modules()
            if isinstance(module, WanTransformerBlock)
        ]
        places: list[tuple[Any, str]] = [(block, "forward") for block in blocks]
        places += [(vae, name) for name in _CHUNKS if vae is not None]
        for owner, name in places:
            if not _is_own(owner, name):
                raise ValueError(
                    f"{type(owner).__name__}.{name} is replaced already, by a step cache, an offload or "
                    "another compilation; compile first, or take that away"
                )
        functions: dict[Any, Any] = {}
        for owner, name in places:
            function = getattr(type(owner), name)
            if function not in functions:
                functions[function] = torch.compile(function, **options)
            # Past nn.Module's own attributes: this is no parameter, module or buffer.
            vars(owner)[name] = MethodType(functions[function], owner)
        self._places = places
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def detach(self) -> None:
        """Run as before; what is compiled is dropped."""
        for owner, name in self._places:
            vars(owner).pop(name, None)
        if self._places:
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)
        self._places = []

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        logger.info("compiled in %.1f s; %.1f s in all", seconds, self.seconds)


def _is_own(owner: Any, name: str) -> bool:
    """Whether an object's method is its class's; what took it away may have left that on the object."""
    found = vars(owner).get(name)
    return found is None or getattr(found, "__func__", None) is getattr(type(owner), name)
