"""Fill models with the weights of files: rename, account for every one, assign."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from ...checks import listed
from ...private_apis import own_tensors
from ...progress import advance
from ..deferred import deferred, should_defer
from ..files.quantized import QuantizedTensor, expanded
from ..naming.dialects import Tensors
from ..naming.names import shapes_of
from ..quantized_linear import QuantizedLinear
from .dtypes import dtype_for

# Values of a weight below which deferring its conversion saves nothing.
DEFERRED_SIZE = 2**16

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Build models whose weights are meta tensors, and so take no memory and no time."""
    with no_init_weights(), torch.device("meta"):
        yield


def account(source: str, missing: Iterable[str], extra: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights of a model, or has extra ones; the first few are named."""
    if names := list(missing):
        raise ValueError(f"{source} lacks {listed(names)}")
    if names := list(extra):
        raise ValueError(f"{source} holds {listed(names)}, which this model has no place for")


def fill(
    model: Model,
    source: str,
    tensors: Tensors,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    in_float32: Iterable[str] = (),
) -> Model:
    """Give a model on the meta device its weights, by its own names, in place; return it in evaluation mode.

    Weights that are in the dtype asked for stay memory-mapped; others are converted one by one, or when they
    are used if the converted ones take too much memory, see `deferred`. A ValueError names the first few
    weights that are missing, left over, or of another shape.

    Args:
        source: the file, for errors.
        dtype: dtype of the parameters; None: as they are stored, bfloat16 for those that were quantised.
        dequantize: whether to expand quantised weights of linear layers, which stay quantised otherwise.
        in_float32: names of modules and parameters that are float32 in a half-precision model.
    """
    expected = shapes_of(model.state_dict())
    found = shapes_of(tensors)
    account(source, expected.keys() - found.keys(), found.keys() - expected.keys())
    if wrong := [name for name, shape in found.items() if shape != expected[name]]:
        name = min(wrong)
        rule = f"{name} is {found[name]}, it must be {expected[name]}"
        raise ValueError(f"{source}: {listed(wrong)} of another shape; {rule}")
    quantized: dict[str, QuantizedTensor] = {}
    converted: dict[str, torch.dtype] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = modules[path]
        if isinstance(tensor, QuantizedTensor):
            if type(owner) is nn.Linear and attribute == "weight" and not dequantize:
                quantized[path] = tensor
                continue
            stored, asked = torch.float32, dtype or torch.bfloat16
        else:
            stored, asked = tensor.dtype, dtype or tensor.dtype
        target = dtype_for(owner, name, stored, asked, in_float32)
        if target != stored or isinstance(tensor, QuantizedTensor):
            converted[name] = target
            continue
        value = cast(torch.Tensor, tensor)
        advance(bytes_to_convert(tensor, dtype, dequantize))
        if dtype not in (None, target):
            value = value.clone()  # these few would keep the pages of the whole file in memory
        owner.register_parameter(attribute, nn.Parameter(value))
    defer = should_defer(sum(target.itemsize * math.prod(found[name]) for name, target in converted.items()))
    for name, target in converted.items():
        path, _, attribute = name.rpartition(".")
        stored_as = tensors[name]
        later = defer and not stored_as.is_meta and math.prod(found[name]) >= DEFERRED_SIZE
        value = deferred(stored_as, target) if later else expanded(stored_as).to(target)
        advance(bytes_to_convert(stored_as, dtype, dequantize))
        modules[path].register_parameter(attribute, nn.Parameter(value))
    for path, weight in quantized.items():  # once their biases are there
        parent, _, attribute = path.rpartition(".")
        bias = own_tensors(modules[path])[0]["bias"]
        layer = QuantizedLinear(weight, bias, dtype or torch.bfloat16)
        setattr(modules[parent], attribute, layer)
    return model.eval()


def bytes_to_convert(
    tensor: torch.Tensor | QuantizedTensor, dtype: torch.dtype | None, dequantize: bool = False
) -> int:
    """Return the bytes in the file of a weight that does not stay mapped in a model of this dtype, or 0."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.nbytes if dequantize else 0
    return tensor.nbytes if dtype not in (None, tensor.dtype) else 0
