"""Models in half the memory: the large linear layers in float8 or int8, with a scale per output or group.

    from wan22.accel import quantize

    quantize.quantize(pipe.transformer, "fp8")

Relative errors of a layer with normally distributed weights and 5,120 or 13,824 inputs, measured: "fp8"
2.6e-2, "int8" 9e-3, "int8" with block=128 6.5e-3, "fp8_dynamic" 3.8e-2; bf16 alone has 1.7e-3.

Shapes: l tokens, o outputs, i inputs of a linear layer, g groups of inputs with a scale of their own.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from ..checkpoints.files.quantized import LARGEST, ROWS, QuantizedTensor, ScaledNumbers, scaled_numbers
from ..checkpoints.loading.models import is_ours
from ..checkpoints.lora.injecting import lora_layers
from ..checkpoints.quantized_linear import QuantizedLinear
from ..checks import cut, shown
from ..host_memory import anonymous_bytes, check_room, trim_heap
from ..models.fused import fused
from ..private_apis import accelerate_hook, reapply_group_offloading, scaled_mm, uncompiled, version
from ..progress import advance
from .offload.layout import blocks_of, bytes_of
from .quantized_layers import formats_of, is_quantized, is_quantized_layer

Model = TypeVar("Model", bound=nn.Module)

KINDS = {"fp8": torch.float8_e4m3fn, "fp8_dynamic": torch.float8_e4m3fn, "int8": torch.int8}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What the float8 product asks of both sizes of a weight.
MULTIPLE = 16


def quantize(model: Model, method: Any, block: int | None = None) -> Model:
    """Quantise the large linear layers of a model's blocks in place, one after the other; return the model.

    Those are attention's projections and the feed-forward's layers; norms, embeddings, modulation and head
    stay as they are. The original weights are gone afterwards. LoRAs are loaded after this, not before.

    Args:
        model: a WanTransformer3DModel or umT5 (UMT5EncoderModel), compiled or not.
        method: "fp8" and "int8" keep weights in these dtypes, and compute in the input's; "fp8_dynamic"
            multiplies in float8, too: faster on GPUs of compute capability 8.9 and more, and less accurate,
            as activations are rounded, with a scale per token. Or one of torchao's configurations.
        block: number of inputs that share a scale, for "fp8" and "int8"; None: all inputs of an output.

    Raises:
        ValueError: the method is unknown or does not fit a layer, or the model is quantised already, has
            LoRAs, or is offloaded piece by piece.
        MemoryError: the host has no room for the quantised weights, which are in no file.
        ImportError: torchao is not installed, and the configuration is not one of the names.
    """
    layers = check(model, method, block)
    check_memory([layers])
    inner = uncompiled(model)
    if isinstance(method, str):
        for name in list(layers):
            # Taken out of the table, so that only one weight at a time exists twice.
            advance(layers[name].weight.nbytes)
            _put(inner, name, _quantized(layers.pop(name), method, block))
    else:
        _quantize_by_torchao(inner, method, set(layers))
    trim_heap()  # what a layer's rounding took does not stay the process's
    reapply_group_offloading(inner)  # so that the new layers are offloaded, too
    return model


def check(model: nn.Module, method: Any, block: int | None = None) -> dict[str, nn.Linear]:
    """Refuse what `quantize` refuses; return the layers that it would quantise, by name."""
    layers = _layers_to_quantize(uncompiled(model))
    if isinstance(method, str):
        check_method(method)
        _check_fit(method, block, layers)
        if KINDS[method].is_floating_point and get_module_execution_device(model).type == "mps":
            raise ValueError(f"method {shown(method)}: MPS has no float8; 'int8' is the nearest")
    elif block is not None:
        raise ValueError(f"block={block} is for {', '.join(KINDS)}; torchao's configurations have their own")
    return layers


def check_memory(models: Iterable[Mapping[str, nn.Linear]]) -> None:
    """Refuse, with a MemoryError, to quantise layers of models, by name, if the host has no room for that."""
    weights = [layer.weight for layers in models for layer in layers.values()]
    taken = sum(weight.numel() for weight in weights if weight.device.type == "cpu")
    advice = "load weights that are quantised already, such as `wan22 prepare --dtype fp8` writes"
    check_room(taken - anonymous_bytes(weights), "quantizing", advice)


def dequantize(model: Model) -> Model:
    """Make ordinary layers of quantised ones in place, those from files included; return the model.

    Weights keep the quantised values: only loading the model again brings the original ones back.

    Raises: ValueError: no layer is quantised.
    """
    inner = uncompiled(model)
    names = [name for name, module in inner.named_modules() if is_quantized_layer(module)]
    if not names:
        raise ValueError(f"no layer of this {type(inner).__name__} is quantised")
    for name in names:
        layer = inner.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            _put(inner, name, layer.expand())
        else:
            before = f"{next(iter(formats_of(layer)))}, expanded"
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
            vars(layer)["expanded_from"] = before
    reapply_group_offloading(inner)
    return model


class DynamicFloat8Linear(QuantizedLinear):
    """A quantised layer that rounds its input to float8, too, and multiplies float8 by float8.

    It computes as its base class does where the device has no such product, and for gradients.
    """

    method = "fp8_dynamic"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map "… i" to "… o", in the input's dtype."""
        form = _product_form(input.device)
        if form is None or input.requires_grad:
            return super().forward(input)
        compiling = torch.compiler.is_compiling()  # the compiler shares them itself
        rows, scale = _rows(input) if compiling else _shared.rows_of(input)
        weight, weight_scale = (self.parts[name] for name in ("data", "scale"))
        weight = weight.view(torch.float8_e4m3fn).t()
        # Products are bf16: in another dtype, a bias within them would be rounded with them.
        within = self.bias is not None and input.dtype == torch.bfloat16
        bias = self.bias.to(torch.bfloat16) if within else None
        out = _PRODUCTS[form](rows, weight, scale, weight_scale.reshape(1, -1), bias).to(input.dtype)
        if self.bias is not None and not within:
            out = out.add_(self.bias.to(out.dtype))
        return out.unflatten(0, input.shape[:-1])


class _SharedInput(threading.local):
    """The last input of a thread in float8, for queries, keys and values are products of the same one."""

    def __init__(self) -> None:
        self._input: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def rows_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return "l i" of "… i" in float8 and their scales "l 1"; they are kept as long as x lives."""
        if x.is_inference():  # which counts no writes
            return _rows(x)
        if self._input() is not x or self._version != version(x) or self._found is None:
            self._found = None  # before the next ones are made
            self._found = _rows(x)
            self._input, self._version = weakref.ref(x, self._forget), version(x)
        return self._found

    def _forget(self, reference: Any) -> None:
        if reference is self._input:
            self._found = None


_shared = _SharedInput()


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, scale = _per_token_float8(x.flatten(0, -2)[None])
    return rows[0], scale[0]


@fused
def _per_token_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return "1 l i" in float8, and the scale of each token, "1 l 1" in float32."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    # In the dtype of x, so that no float32 copy of x is made. The scale is the inverse of the rounded factor,
    # so that it costs nothing: 3.71e-2 against 3.69e-2 in bf16. The bound keeps float16 finite.
    factor = LARGEST[torch.float8_e4m3fn] / largest.clamp_min(500 / torch.finfo(x.dtype).max)
    return (x * factor).to(torch.float8_e4m3fn), factor.float().reciprocal()


def _scaled_by_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply "l i" by "i o" with scales "l 1" and "1 o", and add a bias "o" in bf16.

    It is one kernel, from compute capability 9.0.
    """
    return scaled_mm(
        x, weight, scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda
    )


def _scaled_afterwards(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do the same where kernels take one scale for all, as on 8.9: both scales factor out of the sums."""
    one = torch.ones((), device=x.device)
    out = scaled_mm(x, weight, one, one, out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda)
    out = out.mul_(scale).mul_(weight_scale)
    return out if bias is None else out.add_(bias)


_PRODUCTS = {"by rows": _scaled_by_rows, "afterwards": _scaled_afterwards}


@torch.compiler.assume_constant_result
def _product_form(device: torch.device) -> str | None:
    # On the meta device the memory of an expanded weight is counted, which is the larger.
    return None if device.type == "meta" else _tried_form(device)


@cache
@torch.no_grad()
def _tried_form(device: torch.device) -> str | None:
    """Try the products, for PyTorch's version decides as well which kernels exist."""
    x = torch.ones(MULTIPLE, MULTIPLE, device=device).to(torch.float8_e4m3fn)
    scale = torch.full((MULTIPLE, 1), 0.5, device=device)
    bias = torch.ones(MULTIPLE, dtype=torch.bfloat16, device=device)
    for name, product in _PRODUCTS.items():
        try:
            out = product(x, x.t(), scale, scale.t(), bias)
        except (RuntimeError, ValueError):
            continue
        if bool((out == MULTIPLE / 4 + 1).all()):
            return name
    return None


# ---- one layer ----


def _quantized(linear: nn.Linear, method: str, block: int | None) -> QuantizedLinear:
    kind, groups = KINDS[method], linear.in_features // (block or linear.in_features)
    pairs = [scaled_numbers(rows, kind, groups) for rows in linear.weight.detach().split(ROWS)]
    data, scale = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    shape = (linear.out_features, linear.in_features)
    tensor = QuantizedTensor(shape, ScaledNumbers(kind, groups), {"data": data, "scale": scale})
    layer = DynamicFloat8Linear if method == "fp8_dynamic" else QuantizedLinear
    bias = None if linear.bias is None else linear.bias.detach()
    quantized = layer(tensor, bias, linear.weight.dtype).train(linear.training)
    if (before := getattr(linear, "expanded_from", None)) is not None:
        vars(quantized)["expanded_from"] = before
    return quantized


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


# ---- which layers ----


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of a model's blocks, by their names in the model."""
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} is neither a Wan transformer nor umT5")
    for path, block in model.named_modules():
        if any(block is one for one in blocks):
            for name, module in block.named_modules(prefix=path):
                if isinstance(module, nn.Linear):
                    yield name, module


def _layers_to_quantize(model: nn.Module) -> dict[str, nn.Linear]:
    kind, layers = type(model).__name__, dict(_linears(model))
    if lora_layers(model):
        raise ValueError(
            f"this {kind} has LoRAs, whose strengths could not be changed later; call unload_lora_weights() "
            "first, and load them again afterwards"
        )
    if is_quantized(model):
        found = cut(", ".join(formats_of(model)))
        raise ValueError(
            f"this {kind} is quantised already ({found}); load it again to quantise it by another method, or "
            "call dequantize first, which keeps the rounded values"
        )
    for name, layer in layers.items():
        if accelerate_hook(layer) and layer.weight.is_meta:
            raise ValueError(
                f"{name}.weight is not there (offloaded piece by piece); quantize before "
                "enable_sequential_cpu_offload"
            )
        if layer.weight.dtype not in DTYPES:
            raise ValueError(
                f"{name}.weight is stored in {layer.weight.dtype}; it must be one of "
                f"{', '.join(map(str, DTYPES))}"
            )
    return layers


def check_method(method: Any) -> None:
    """Refuse an unknown name of a method."""
    if isinstance(method, str) and method not in KINDS:
        raise ValueError(f"method {shown(method)} must be {', '.join(KINDS)} or a configuration of torchao")


def _check_fit(method: str, block: int | None, layers: Mapping[str, nn.Linear]) -> None:
    if block is not None and method == "fp8_dynamic":
        raise ValueError("fp8_dynamic has one scale for all inputs of an output; leave block out")
    for name, layer in layers.items():
        o, i = layer.out_features, layer.in_features
        if block is not None and (block < 1 or i % block):
            raise ValueError(f"block={block} does not divide the {i} inputs of {name}")
        if method == "fp8_dynamic" and (o % MULTIPLE or i % MULTIPLE):
            raise ValueError(
                f"{name} has {i} inputs and {o} outputs; fp8_dynamic needs multiples of {MULTIPLE}"
            )


def _quantize_by_torchao(model: nn.Module, config: Any, names: set[str]) -> None:
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        message = f"{type(config).__name__} is taken for torchao's configuration: pip install torchao"
        raise ImportError(message) from error
    quantize_(model, config, filter_fn=lambda module, name: name in names)


# ---- what it costs ----


@dataclass(frozen=True)
class Report:
    """What quantising did to a model; errors are relative, in the L2 norm."""

    layers: Mapping[str, float]  # error of each layer's weight, by name
    block: float  # error of the first block's output
    output: float  # error of the model's output
    bytes_before: int  # size of the plain model's parameters and buffers
    bytes_after: int

    def __str__(self) -> str:
        errors = sorted(self.layers.values())
        worst = max(self.layers, key=lambda name: self.layers[name])
        share = self.bytes_after / self.bytes_before
        return "\n".join(
            (
                f"weights  {errors[len(errors) // 2]:.1e} relative error, median of {len(errors)} layers",
                f"         {errors[-1]:.1e} at most, {worst}",
                f"block 0  {self.block:.1e}",
                f"output   {self.output:.1e}",
                f"bytes    {self.bytes_before / 1e9:.3f} GB -> {self.bytes_after / 1e9:.3f} GB, {share:.2f}",
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
    others = dict(_linears(quantized))
    layers = {
        name: _relative(_values(others[name]), _values(layer))
        for name, layer in _linears(plain)
        if is_quantized_layer(others[name])
    }
    if not layers:
        raise ValueError(f"no layer of the second {type(quantized).__name__} is quantised")
    block, output = zip(_outputs(plain, inputs), _outputs(quantized, inputs), strict=True)
    found = Report(
        layers, _relative(*block[::-1]), _relative(*output[::-1]), bytes_of(plain), bytes_of(quantized)
    )
    print(found)
    return found


def _values(layer: nn.Linear) -> torch.Tensor:
    if isinstance(layer, QuantizedLinear):
        return layer.values()
    return (layer.weight.dequantize() if is_quantized_layer(layer) else layer.weight).float()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return ((found.float().to(expected.device) - expected).norm() / expected.norm()).item()


def _outputs(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of a model's first block and of itself."""
    device, seen = get_module_execution_device(model), []
    hook = blocks_of(model)[0].register_forward_hook(lambda module, args, output: seen.append(output))
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
