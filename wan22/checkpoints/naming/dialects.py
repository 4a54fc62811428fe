"""Bring the many ways in which files prefix and scale the same weights to one form.

Sources: ComfyUI comfy/quant_ops.py and comfy/ops.py, musubi-tuner fp8_optimization_utils.py, LightX2V
tools/convert/quant/quant.py and common/ops/mm/mm_weight.py, TurboDiffusion turbodiffusion/ops/core.py.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...checks import cut, listed
from ..files.nvfp4 import nvfp4
from ..files.quantized import FLOAT8, QuantizedTensor, scaled_tensor, scaled_tiles
from ..files.weights import WeightFile
from .configs import PATCH_SIZE

Tensors = dict[str, torch.Tensor | QuantizedTensor]

# How the names of each model begin in a file that holds several, as ComfyUI saves them.
PARTS = {
    "transformer": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoders.umt5xxl.",),
    "image_encoder": ("vision_model.", "visual_projection."),
}
# Prefixes that all names of a model may have.
_PREFIXES = (
    *("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "vae."),
    *("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "umt5xxl.transformer."),
    *("transformer.", "module.", "model."),
)
# Beside a weight X.weight: its scale, under either name; the scale of the layer's inputs, of no use where the
# weight is expanded and not the inputs rounded; and ComfyUI's note on how X is quantised.
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_NOTE = ".comfy_quant"
_COMPILED = "_orig_mod."  # torch.compile's, somewhere in a name
_MARKER = "scaled_fp8"  # says that all float8 weights of the file have scales
_NOTES = "_quantization_metadata"  # the notes on all layers, in the header
# ComfyUI's names of formats, and the dtypes of their weights; what its notes may say beside the name.
_FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT8}
_FORMATS |= {"int8_tensorwise": torch.int8, "nvfp4": torch.uint8}
_HARMLESS = {"format", "full_precision_matrix_mult", "group_size", "per_row"}
# TurboDiffusion's int8 weight and its scales; LightX2V's factors of NVFP4, beside a weight of pairs in bytes.
_TILES, _TILE_SCALES = ".int8_weight", ".scale"
_FACTOR_2, _GLOBAL, _ALPHA = ".weight_scale_2", ".weight_global_scale", ".alpha"
_INPUT_GLOBAL, _INPUT_MOST = ".input_global_scale", ".input_absmax"
# Beside weights that are quantised in other ways.
_OTHERS = {
    ".weight_zero_point": "int8 or int4 with zero points",
    ".qweight": "GPTQ or AWQ",
    ".quant_map": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
}
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def normalize(file: WeightFile) -> Tensors:
    """Return a file's tensors without prefixes, each quantised weight together with its scales.

    A ValueError names a layer that is quantised in an unknown way, or lacks its scale.
    """
    found: dict[str, torch.Tensor | QuantizedTensor] = {}
    for key, name in stripped(file.tensors).items():
        if name in found:
            raise ValueError(f"{file.source} holds {cut(name)} twice, compiled and not")
        found[name] = file.tensors[key]
    for suffix, kind in _OTHERS.items():
        if marks := [name for name in found if name.endswith(suffix)]:
            raise ValueError(
                f"{file.source} is quantised as {kind} ({cut(marks[0])}); scaled float8 and int8, nvfp4 of "
                "ComfyUI and LightX2V, and GGUF are read"
            )
    marked = found.pop(_MARKER, None) is not None
    _unflatten_patches(found)
    notes = _notes(file, found)
    for layer, note in notes.items():
        _check_note(file.source, layer, note, found)
    with _named(file.source):
        _join_tiles(found)
        _join_nvfp4(found, notes)
    scales = {name: found.pop(name) for name in [*found] if name.endswith(_WEIGHT_SCALES)}
    for name in [*found]:
        if name.endswith(_INPUT_SCALES):
            del found[name]
    result: Tensors = {}
    for name, tensor in found.items():
        layer = name.removesuffix(".weight")
        scale = next((scales.pop(layer + s) for s in _WEIGHT_SCALES if layer + s in scales), None)
        if isinstance(tensor, QuantizedTensor) or tensor.dtype in _PLAIN:
            if scale is not None:
                raise ValueError(f"{file.source}: {cut(name)} is not float8, but has a scale")
            result[name] = tensor
        elif tensor.dtype in FLOAT8 or (tensor.dtype == torch.int8 and name.endswith(".weight")):
            scaled = tensor.dtype == torch.int8 or ((marked or layer in notes) and tensor.ndim == 2)
            if scale is None and scaled and name.endswith(".weight"):
                kind = "int8" if tensor.dtype == torch.int8 else "float8"
                raise ValueError(f"{file.source}: {cut(name)} is scaled {kind}, but its scale is missing")
            try:
                result[name] = scaled_tensor(tensor, None if scale is None else _number(scale))
            except ValueError as error:
                raise ValueError(f"{file.source}: {cut(name)}: {error}") from error
        else:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{file.source}: {cut(name)} is {kind}; weights of this kind are not read")
    if scales:
        raise ValueError(f"{file.source}: there is no weight for {listed(scales)}")
    return result


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of each model in a file that holds several, by the model's kind; {} if it does not."""
    names = list(names)
    parts = {kind: [name for name in names if name.startswith(starts)] for kind, starts in PARTS.items()}
    parts = {kind: own for kind, own in parts.items() if own}
    return parts if len(parts) > 1 else {}


def part_of(file: WeightFile, kind: str) -> WeightFile:
    """Return one model of a file that holds several; any other file as it is.

    A ValueError says that the file does not hold it, or names a tensor that belongs to none of them.
    """
    parts = parts_of(file.tensors)
    if not parts:
        return file
    if rest := file.tensors.keys() - {name for names in parts.values() for name in names}:
        raise ValueError(f"{file.source} holds {listed(rest)}, which belongs to no known model")
    if kind not in parts:
        raise ValueError(f"{file.source} holds {' and '.join(parts)}, but no {kind}")
    metadata, notes = dict(file.metadata), _noted_layers(file)
    if notes:
        own = {name: note for name, note in notes.items() if name.startswith(PARTS[kind])}
        metadata[_NOTES] = json.dumps({"layers": own})
    tensors = {name: file.tensors[name] for name in parts[kind]}
    return replace(file, tensors=tensors, metadata=metadata)


def stripped(names: Iterable[str]) -> dict[str, str]:
    """Return a file's names without the prefix that all have, by the names in the file."""
    plain = {name: name.replace(_COMPILED, "") for name in names}
    for prefix in _PREFIXES:
        # ComfyUI's marker may stand before the prefix.
        if all(name.startswith(prefix) or name == _MARKER for name in plain.values()):
            return {key: name.removeprefix(prefix) for key, name in plain.items()}
    return plain


def _notes(file: WeightFile, found: Tensors) -> dict[str, dict]:
    """Take the notes on quantised layers out of the tensors; return them by layer, with the header's."""
    notes: dict[str, dict] = {}
    for name in [name for name in found if name.endswith(_NOTE)]:
        text = _number(found.pop(name))
        if text.dtype != torch.uint8 or text.ndim != 1:
            raise ValueError(f"{file.source}: {cut(name)} is no text: {text.ndim} axes of {text.dtype}")
        notes[name.removesuffix(_NOTE)] = _table(file.source, name, bytes(text.tolist()))
    for layer, note in _noted_layers(file).items():
        for prefix in _PREFIXES:
            layer = layer.removeprefix(prefix)
        notes.setdefault(layer, note)
    return notes


def _noted_layers(file: WeightFile) -> dict[str, dict]:
    """Return the notes on layers in a file's header."""
    layers = _table(file.source, _NOTES, file.metadata.get(_NOTES, "{}")).get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(note, dict) for note in layers.values()):
        raise ValueError(f"{file.source}: {_NOTES} has no table of layers")
    return layers


def _table(source: str, name: str, text: str | bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{source}: {cut(name)} is not JSON: {cut(error)}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{source}: {cut(name)} holds a {type(table).__name__}, not a table")
    return table


def _check_note(source: str, layer: str, note: dict, tensors: Tensors) -> None:
    kind, weight = note.get("format"), tensors.get(f"{layer}.weight")
    if not isinstance(kind, str) or kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ValueError(
            f"{source}: {cut(layer)} is quantised as {cut(kind)}; of such layers {known} are read"
        )
    # Such as convrot, of weights that are turned before they are rounded.
    others = sorted(key for key in note.keys() - _HARMLESS if note[key] and _FORMATS[kind] not in FLOAT8)
    if others:
        rule = f"is quantised as {kind} with {cut(others[0])}, which is not read"
        raise ValueError(f"{source}: {cut(layer)} {rule}")
    if weight is None:
        raise ValueError(f"{source} describes {cut(layer)}, but has no weight of it")
    if isinstance(weight, QuantizedTensor) or weight.dtype != _FORMATS[kind]:
        stored = "GGUF" if isinstance(weight, QuantizedTensor) else weight.dtype
        raise ValueError(f"{source}: {cut(layer)} is said to be {kind}, but is {stored}")


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _unflatten_patches(found: Tensors) -> None:
    """Give TurboDiffusion's patch embedding, a linear layer of "c kt kh kw" inputs, its axes, in place."""
    patches = found.get("patch_embedding.weight")
    if not isinstance(patches, torch.Tensor) or patches.ndim != 2:
        return
    if not patches.shape[1] % math.prod(PATCH_SIZE):
        found["patch_embedding.weight"] = patches.unflatten(1, (-1, *PATCH_SIZE))


def _join_tiles(found: Tensors) -> None:
    """Put TurboDiffusion's int8 weights and their scales together, in place."""
    for layer in [name.removesuffix(_TILES) for name in found if name.endswith(_TILES)]:
        name, data = f"{layer}.weight", found.pop(layer + _TILES)
        scale = found.pop(layer + _TILE_SCALES, None)
        if scale is None:
            raise ValueError(f"{cut(layer + _TILES)} is int8, but its scale is missing")
        if name in found:
            raise ValueError(f"there are {cut(name)} and {cut(layer + _TILES)}")
        with _named(cut(name)):
            found[name] = scaled_tiles(_number(data), _number(scale))


def _join_nvfp4(found: Tensors, notes: Mapping[str, dict]) -> None:
    """Put ComfyUI's NVFP4 weights, which notes tell of, and LightX2V's together with their scales, in place.

    Both have the scales of blocks in the order of the tensor cores; a pair's first number is in the upper
    bits of ComfyUI's, and in the lower ones of LightX2V's. What others write is not told apart for sure.
    """
    marks = (_FACTOR_2, _GLOBAL, _INPUT_GLOBAL)
    layers = {name.removesuffix(mark): name for mark in marks for name in found if name.endswith(mark)}
    layers |= {layer: layer for layer, note in notes.items() if note["format"] == "nvfp4"}
    for layer, mark in layers.items():
        name, comfy = f"{layer}.weight", notes.get(layer, {}).get("format") == "nvfp4"
        data, scale = found.get(name), found.get(f"{layer}.weight_scale")
        theirs = [n for n in (_GLOBAL, _INPUT_GLOBAL) if layer + n in found]
        if comfy == bool(theirs) or (layer + _FACTOR_2 in found) != comfy:
            rule = "but not as ComfyUI or LightX2V writes it"
            raise ValueError(f"it is quantised as nvfp4 ({cut(mark)}), {rule}")
        if data is None or scale is None:
            raise ValueError(f"{cut(layer)} is quantised as nvfp4, but its weight or its scale is missing")
        with _named(cut(name)):
            factor = _number(found.pop(layer + _FACTOR_2)) if comfy else _factor(found, layer)
            found[name] = nvfp4(_number(data), _number(found.pop(f"{layer}.weight_scale")), factor, comfy)
        for used in (_ALPHA, _GLOBAL, _INPUT_GLOBAL, _INPUT_MOST):
            found.pop(layer + used, None)


def _factor(found: Tensors, layer: str) -> torch.Tensor:
    """Return the factor of LightX2V's weights: alpha is 1 / (input's global scale · weight's)."""
    if (own := found.get(layer + _GLOBAL)) is not None:
        return 1 / _number(own).float()
    if (alpha := found.get(layer + _ALPHA)) is None:
        raise ValueError("its alpha is missing")
    return _number(alpha).float() * _number(found[layer + _INPUT_GLOBAL]).float()


def _number(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    if isinstance(tensor, QuantizedTensor):
        raise ValueError("a scale is itself quantised")
    return tensor
