"""Write an adapter as diffusers does, or with the official names, which ComfyUI reads, too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from ..naming.keys import TRANSFORMER
from .differences import Differences
from .injecting import SCALED, full_scale, lora_layers, path_of

PREFIX = "diffusion_model."
FILE_NAME = "pytorch_lora_weights.safetensors"
_SUFFIXES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}


def save_as_diffusers(
    model: Any, key: str, folder: Path, weight_name: str | None, upcast: bool, safe: bool
) -> None:
    """Write an adapter as diffusers does, PEFT's configuration in the header; the model stays as it is."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=key)
    if not safe:  # such a file has no header
        factors = {path_of(p, layer): full_scale(layer, key) for p, layer in _layers(model, key).items()}
        for name in [name for name in state if ".lora_B." in name]:
            factor = factors[name.partition(".lora_B.")[0].replace(".base_layer", "")]
            state[name] = state[name] * factor
    WanLoraLoaderMixin.write_lora_layers(
        {name: tensor.float() if upcast else tensor for name, tensor in state.items()},
        str(folder),
        is_main_process=True,
        weight_name=weight_name,
        save_function=None,
        safe_serialization=safe,
        lora_adapter_metadata=model.peft_config[key].to_dict() if safe else None,
    )


def diffusers_state(model: Any, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's tensors by PEFT's names, which diffusers has, too, and PEFT's configuration.

    A ValueError says what that layout cannot hold.
    """
    from peft import get_peft_model_state_dict

    if refusal := save_refusal(model, key, foreign=True):
        raise ValueError(f"the adapter {refusal}")
    config = model.peft_config[key].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return get_peft_model_state_dict(model, adapter_name=key), plain


def _layers(model: Any, key: str) -> dict[str, Any]:
    return {path: layer for path, layer in lora_layers(model).items() if key in layer.scaling}


def save_official(model: Any, key: str, folder: Path, weight_name: str | None, upcast: bool) -> None:
    """Write an adapter, by PEFT's name for it, into a folder."""
    tensors = {
        f"{PREFIX}{name}": (tensor.float() if upcast else tensor).detach().cpu().contiguous()
        for name, tensor in official_tensors(model, key)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / (weight_name or FILE_NAME), {"format": "pt"})


def save_refusal(model: Any, key: str, foreign: bool = False) -> str | None:
    """Return what diffusers' layout cannot hold of an adapter, or None.

    `foreign`: diffusers or PEFT has made it, and its configuration tells a LoKr's factors.
    """
    layers = _layers(model, key).values()
    if any(isinstance(layer, Differences) for layer in layers):
        return "has whole differences, which diffusers' layout cannot hold"
    kinds = {_kind(layer, key) for layer in layers}
    if len(kinds) > 1:
        return f"is of several kinds ({', '.join(sorted(kinds))}), which diffusers' layout cannot hold"
    if not foreign and kinds - {"LoRA", "DoRA"}:
        return f"is a {kinds.pop()}, whose factors PEFT's configuration does not tell"
    return None


def _kind(layer: Any, key: str) -> str:
    if hasattr(layer, "lora_A"):
        return "DoRA" if key in layer.lora_magnitude_vector else "LoRA"
    return "LoKr" if hasattr(layer, "lokr_w1") else "LoHa"


def official_tensors(model: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapter's tensors with their official names, alpha / r multiplied into a matrix."""
    for path, layer in _layers(model, key).items():
        if isinstance(layer, Differences):
            for parameter, tensor in layer.tensors[key].items():
                stem, _, kind = _name(f"{layer.path}.{parameter}".removeprefix(".")).rpartition(".")
                yield f"{stem}.{_SUFFIXES[kind]}", tensor
        else:
            stem = _name(f"{path_of(path, layer)}.weight").removesuffix(".weight")
            yield from ((f"{stem}.{name}", tensor) for name, tensor in _parts(layer, key))


def _parts(layer: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    factor = full_scale(layer, key)  # into a matrix: without an alpha beside them, every reader takes 1
    dictionaries = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    parts: dict[str, Any] = {name: held[key] for name, held in dictionaries.items() if key in held}
    scaled = next(name for name in SCALED if name in parts)
    for name, part in parts.items():
        tensor: Tensor = part.weight if isinstance(part, nn.Module) else part  # type: ignore[assignment]
        if name == scaled and factor != 1:
            tensor = (tensor.float() * factor).to(tensor.dtype)
        if name == "lora_magnitude_vector":
            yield "dora_scale", tensor.reshape(-1, 1)
        else:
            yield name + (".weight" if name.startswith("lora_") else ""), tensor
        if name == "lora_B" and part.bias is not None:
            yield "diff_b", part.bias * factor


def _name(ours: str) -> str:
    official = TRANSFORMER.inverse.rename(ours)
    if official is None:
        raise ValueError(f"{ours} has no official name")
    return official
