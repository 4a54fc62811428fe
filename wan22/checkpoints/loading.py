"""Fill models with the weights of files: rename, account for every one, assign; make them ready to run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from diffusers.models.modeling_utils import no_init_weights
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from ..models.layers import Float32Linear
from .dialects import Tensors
from .keys import KeyTable
from .quantized import QuantizedLinear, QuantizedTensor, expanded

Model = TypeVar("Model", bound=nn.Module)
HALF = (torch.float16, torch.bfloat16)

# What PyTorch's own allocator gives on CPU, in bytes.
CPU_ALIGNMENT = 64


def align_weights(model: nn.Module | None) -> None:
    """Copy, in place, those weights that lie at an odd address, if the model runs on the CPU.

    The weights of a memory-mapped file lie wherever its header ends, and the CPU's matrix kernels add up in
    another order at another alignment: the same bf16 weights in two files gave latents 1.4e-2 apart. Each odd
    one is copied by itself, and only before a run on the CPU; on the way to another device nothing is.

    Args:
        model: whose weights; None is left alone.
    """
    if model is None or get_module_execution_device(model).type != "cpu":
        return
    for tensor in (*model.parameters(), *model.buffers()):
        # Quantised weights are tensors of other classes, with kernels of their own.
        plain = type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu"
        if plain and tensor.data_ptr() % CPU_ALIGNMENT:
            tensor.data = tensor.data.clone()


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor's values."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def official_names(source: str, tensors: Tensors, table: KeyTable, ignored: Iterable[str] = ()) -> Tensors:
    """Return tensors under official names, whether the file has those or ours.

    Args:
        source: the file, for errors.
        tensors: without prefixes.
        table: from official names to ours.
        ignored: names of modules that files hold and no model uses.

    Raises:
        ValueError: tensors have no name in the table; the first few are named.
    """
    tensors = without(tensors, ignored)
    inverse = table.inverse
    if table.count(tensors) >= inverse.count(tensors):
        names = {name: name if table.rename(name) else None for name in tensors}
    else:
        names = {name: inverse.rename(name) for name in tensors}
    if unknown := [name for name, official in names.items() if official is None]:
        raise ValueError(f"{source} holds {listed(unknown)}, which this model has no place for")
    return {official: tensors[name] for name, official in names.items() if official is not None}


def without(tensors: Tensors, ignored: Iterable[str]) -> Tensors:
    """Leave out the tensors of modules with these names."""
    unused = set(ignored)
    return {name: t for name, t in tensors.items() if unused.isdisjoint(name.split("."))}


@contextmanager
def empty_weights() -> Iterator[None]:
    """Build models whose weights are meta tensors, and so take no memory and no time."""
    with no_init_weights(), torch.device("meta"):
        yield


def account(source: str, missing: Iterable[str], extra: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights of a model, or has some that it has no place for.

    Args:
        source: the file, for errors.
        missing: names of parameters without a weight.
        extra: names of weights without a parameter.

    Raises:
        ValueError: there are any; the first few are named.
    """
    if names := list(missing):
        raise ValueError(f"{source} lacks {listed(names)}")
    if names := list(extra):
        raise ValueError(f"{source} holds {listed(names)}, which this model has no place for")


def dtype_for(
    owner: nn.Module, name: str, stored: torch.dtype, asked: torch.dtype, in_float32: Iterable[str]
) -> torch.dtype:
    """Return the dtype that a weight gets in a model of a dtype.

    Args:
        owner: the module that has the weight.
        name: of the weight in the model.
        stored: its dtype.
        asked: the dtype of the model.
        in_float32: names of modules and parameters that are float32 where asked is a half one.
    """
    if set(in_float32).isdisjoint(name.split(".")):
        return asked
    return dtype_within_island(owner, stored, asked)


def dtypes_in(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtypes that a model's weights would have been given on loading it in a dtype.

    Args:
        model: loaded, not quantised.
        dtype: of the model; None: the one that each weight has.
    """
    if dtype is None:
        return {name: weight.dtype for name, weight in model.named_parameters()}
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {
        name: dtype_for(model.get_submodule(name.rpartition(".")[0]), name, weight.dtype, dtype, kept)
        for name, weight in model.named_parameters()
    }


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's weights one by one, in place, as they would have been on loading.

    Args:
        model: a transformer or VAE.
        dtype: of the model; quantised layers compute in it.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        model.to(dtype)
        return
    targets = dtypes_in(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(targets[name])


def dtype_within_island(owner: nn.Module, stored: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """Return the dtype to keep a weight in that takes part in float32 arithmetic.

    Args:
        owner: the module that has the weight.
        stored: its dtype in the file.
        asked: the dtype of the model.

    Returns: float32 in a half-precision model; but the stored half precision where the module widens its
        weights as it computes, which gives the same numbers: 0.37 GB less for an expert of A14B.
    """
    if asked not in HALF:
        return asked
    return stored if stored in HALF and isinstance(owner, Float32Linear) else torch.float32


def fill(
    model: Model,
    source: str,
    tensors: Tensors,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    in_float32: Iterable[str] = (),
) -> Model:
    """Give a model on the meta device its weights, in place.

    Weights that are in the dtype asked for stay memory-mapped; others are converted one by one. Quantised
    weights of linear layers stay quantised.

    Args:
        model: its parameters are replaced.
        source: the file, for errors.
        tensors: under the model's own names.
        dtype: of the parameters; None: that of the file, bfloat16 for what was quantised.
        dequantize: whether to expand quantised weights, too.
        in_float32: names of modules and parameters that are float32 where dtype is a half one.

    Returns: the model, ready to run.

    Raises:
        ValueError: a parameter is missing, is left over, or has another shape; the first few are named.
    """
    expected = shapes_of(model.state_dict())
    found = shapes_of(tensors)
    account(source, expected.keys() - found.keys(), found.keys() - expected.keys())
    if wrong := [name for name, shape in found.items() if shape != expected[name]]:
        name = min(wrong)
        rule = f"{name} is {found[name]}, it must be {expected[name]}"
        raise ValueError(f"{source}: {listed(wrong)} of another shape; {rule}")
    kept = set(in_float32)
    quantized: list[tuple[str, QuantizedTensor]] = []
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(tensor, QuantizedTensor) and type(owner) is nn.Linear and not dequantize:
            quantized.append((path, tensor))
            continue
        target = dtype or (torch.bfloat16 if isinstance(tensor, QuantizedTensor) else tensor.dtype)
        stored = tensor.dtype if isinstance(tensor, torch.Tensor) else torch.float32
        target = dtype_for(owner, name, stored, target, kept)
        value = expanded(tensor).to(target)
        if value is tensor and dtype not in (None, target):
            value = value.clone()  # these few would keep the pages of the whole file in memory
        owner.register_parameter(attribute, nn.Parameter(value))
    for path, weight in quantized:
        parent, _, attribute = path.rpartition(".")
        linear = model.get_submodule(path)
        setattr(
            model.get_submodule(parent),
            attribute,
            QuantizedLinear(weight, linear._parameters["bias"], dtype or torch.bfloat16),
        )
    return model.eval()


def listed(names: Iterable[str]) -> str:
    """Name the first few, in order, and count the rest."""
    first, *rest = sorted(names)
    rest, more = rest[:2], len(rest) - 2
    return ", ".join([first, *rest]) + (f" and {more} more" if more > 0 else "")
