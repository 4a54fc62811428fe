"""torch.compile of what repeats: the transformer's block, once for all layers and both experts; VAE chunks.

A compiled forward lies inside the hooks on its module, so that offloading and step caches stay outside.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import shown
from ..models.autoencoder import AutoencoderKLWan
from ..models.autoencoder_coders import Decoder3d, Encoder3d
from ..models.temporal_cache import TemporalCache
from ..private_apis import allow_recompiling
from .methods import is_own, patch_method
from .offload.layout import blocks_of

# Modes of torch.compile that record CUDA graphs.
_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class Compiled:
    """Compiled functions in place of the forward of transformers' blocks, a VAE's encoder and its decoder.

    Each is compiled at its first call (the VAE's once more, with filled caches), for a second size of video,
    with variable sizes for a third, and when a LoRA's strength first changes; other prompts and the other
    expert reuse it. Strips, and chunks of an image's condition that skip repeated computation, run
    uncompiled.

    Args:
        transformers: models whose blocks are compiled, all of a class by one function.
        vae: wan22's autoencoder, whose encoder and decoder are compiled, too.
        **options: options of torch.compile.

    Raises: ValueError: the options ask for CUDA graphs, or a forward is replaced already, by a step cache.
    """

    def __init__(
        self, transformers: Iterable[nn.Module], vae: AutoencoderKLWan | None = None, **options: Any
    ) -> None:
        _refuse_graphs(options)
        allow_recompiling()
        options = {"fullgraph": True} | options
        modules = [block for model in transformers for block in blocks_of(model)]
        modules += [] if vae is None else [vae.encoder, vae.decoder]
        for module in modules:
            if not is_own(module, "forward"):
                raise ValueError(
                    f"{type(module).__name__}.forward is replaced already, by a step cache, an offload or "
                    "another compilation; compile first, or take that away"
                )
        functions = {kind: _compiled(kind.forward, options) for kind in {type(module) for module in modules}}
        self._methods = [
            (module, patch_method(module, "forward", functions[type(module)])) for module in modules
        ]

    def detach(self) -> None:
        """Run as before; what is compiled is dropped.

        Raises: ValueError: a forward has been replaced since, by a step cache, which would be lost.
        """
        for module, method in self._methods:
            if vars(module).get("forward") is not method and not is_own(module, "forward"):
                raise ValueError(
                    f"{type(module).__name__}.forward has been replaced since it was compiled, by a step "
                    "cache or an offload; take that away first: disable_cache() does a step cache"
                )
        for module, method in self._methods:
            if vars(module).get("forward") is method:
                del vars(module)["forward"]
        self._methods = []


def _compiled(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a forward; that of a VAE's half is used for calls with a chunk and its cache alone."""
    compiled: Any = torch.compile(function, **options)
    compiled.is_compiled = True  # it takes and returns what the function does
    if function not in (Encoder3d.forward, Decoder3d.forward):
        return compiled

    def forward(module: nn.Module, x: Tensor, cache: TemporalCache | None = None, *skips: Any) -> Tensor:
        return (function if any(skips) else compiled)(module, x, cache, *skips)

    return forward


def _refuse_graphs(options: Mapping[str, Any]) -> None:
    """Refuse CUDA graphs: a call would overwrite the result of the call before, the next block's input."""
    asked = [f"mode={shown(mode)}" for mode in _GRAPH_MODES if options.get("mode") == mode]
    asked += ["backend='cudagraphs'"] if options.get("backend") == "cudagraphs" else []
    asked += ["'triton.cudagraphs'"] if (options.get("options") or {}).get("triton.cudagraphs") else []
    if asked:
        raise ValueError(
            f"{asked[0]} records CUDA graphs, which cannot run block by block, as each call writes over the "
            "result of the one before; mode='max-autotune-no-cudagraphs' does the rest"
        )
