"""torch.compile of what repeats: the transformer's block, once for all layers and both experts; VAE chunks.

What is compiled lies inside of what hooks on the blocks do, so that offloading and step caches stay outside.
"""

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..models.autoencoder import AutoencoderKLWan
from ..models.transformer import WanTransformerBlock
from .methods import is_own, patch_method

# Methods of the VAE that are compiled: one step through a clip.
_CHUNKS = ("encode_chunk", "decode_chunk")
# Modes of torch.compile that record CUDA graphs.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class Compiled:
    """Compiled functions in the place of a transformer's blocks' forward and of a VAE's chunks.

    A function is compiled at its first call, and once more for its first call with filled caches; then for
    another size of video, and with variable sizes for a third; and when a LoRA's strength first changes.
    Other prompts and the other expert use what there is. Decoding in strips, and those chunks of an image's
    condition that leave out what would repeat itself, run as they are.

    Args:
        transformers: whose blocks are compiled, all by one function.
        vae: whose chunks are compiled, too; or None.
        **options: of torch.compile.

    Raises:
        ValueError: the options ask for CUDA graphs, or a block's forward is replaced already, by a step
            cache say.
    """

    def __init__(
        self, transformers: Iterable[nn.Module], vae: AutoencoderKLWan | None = None, **options: Any
    ) -> None:
        _refuse_graphs(options)
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
            if not is_own(owner, name):
                raise ValueError(
                    f"{type(owner).__name__}.{name} is replaced already, by a step cache, an offload or "
                    "another compilation; compile first, or take that away"
                )
        functions: dict[Any, Any] = {}
        self._methods: list[tuple[Any, str, MethodType]] = []
        for owner, name in places:
            function = getattr(type(owner), name)
            if function not in functions:
                functions[function] = torch.compile(function, **options)
            self._methods.append((owner, name, patch_method(owner, name, functions[function])))

    def detach(self) -> None:
        """Run as before; what is compiled is dropped.

        Raises:
            ValueError: a method has been replaced since, by a step cache say, which would be lost.
        """
        for owner, name, method in self._methods:
            if vars(owner).get(name) is not method and not is_own(owner, name):
                raise ValueError(
                    f"{type(owner).__name__}.{name} has been replaced since it was compiled, by a step cache "
                    "or an offload; take that away first: disable_cache() does a step cache"
                )
        for owner, name, method in self._methods:
            if vars(owner).get(name) is method:
                del vars(owner)[name]
        self._methods = []


def _refuse_graphs(options: Mapping[str, Any]) -> None:
    """Refuse CUDA graphs: each call would write over what the one before returned, the next block's input.

    Raises:
        ValueError: the options ask for them.
    """
    asked = [f"mode={mode!r}" for mode in _GRAPH_MODES if options.get("mode") == mode]
    asked += ["backend='cudagraphs'"] if options.get("backend") == "cudagraphs" else []
    asked += ["'triton.cudagraphs'"] if (options.get("options") or {}).get("triton.cudagraphs") else []
    if asked:
        raise ValueError(
            f"{asked[0]} records CUDA graphs, which cannot run block by block, as each call writes over the "
            "result of the one before; mode='max-autotune-no-cudagraphs' does the rest"
        )
