"""Load the decoder of a tiny autoencoder: `taew2_1` and `taew2_2`, as .pth or .safetensors."""

import math
from pathlib import Path

import torch

from ...checks import as_path
from ...models.tiny_autoencoder import TinyDecoder
from ..files.weights import read_weights
from ..naming.configs import shape_getter
from ..naming.dialects import normalize
from ..naming.names import shapes_of
from .dtypes import read_dtype
from .fill import empty_weights, fill

# Convolutions whose shapes give the sizes: the first, those after each upsampling, the last; those in time.
_FIRST, _UP, _LAST = "decoder.1", ("decoder.8", "decoder.14", "decoder.20"), "decoder.22"
_FRAMES = ("decoder.7.conv", "decoder.13.conv", "decoder.19.conv")


def load_tiny_decoder(path: str | Path, dtype: torch.dtype | str | None = None) -> TinyDecoder:
    """Load a tiny decoder from .pth or .safetensors, in evaluation mode; sizes are inferred from tensors.

    The encoder in the file is left out; `dtype` None or "auto" keeps the stored one. lightx2v's
    `lighttaew2_1` and `lighttaew2_2` have the same tensors, but take latents that are not normalised: with
    them, previews have the wrong colours.
    """
    asked = read_dtype(dtype)
    file = read_weights(as_path(path))
    tensors = {n: t for n, t in normalize(file).items() if not n.startswith("encoder.")}
    get = shape_getter(file.source, shapes_of(tensors), "decoder like taew2_1 or taew2_2")
    first, *ups, last = (get(f"{name}.weight", 4) for name in (_FIRST, *_UP, _LAST))
    widths = [first[0], *(up[0] for up in ups)]
    factors = [get(f"{name}.weight", 4)[0] // width for name, width in zip(_FRAMES, widths, strict=False)]
    with empty_weights():
        model = TinyDecoder(first[1], math.isqrt(last[0] // 3), widths, factors)
    return fill(model, file.source, tensors, asked)
