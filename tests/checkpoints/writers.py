"""Weight files in the forms that circulate, written as their own programs write them, not by the library."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

Weights = dict[str, torch.Tensor]


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether the usual programs quantise this tensor: the blocks' matrices."""
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2


def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def one_scale(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max().float() / FP8_MAX


def scales_per_output(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return "o g 1"."""
    return weight.float().unflatten(1, (groups, -1)).abs().amax(2, keepdim=True) / FP8_MAX


def comfy_old(weights: Weights, path: Path, prefix: str = "", full_matmul: bool = False) -> Weights:
    """ComfyUI's first fp8_scaled: X.scale_weight and scaled_fp8. Like all, returns the values meant."""
    file, values = {f"{prefix}scaled_fp8": torch.empty(2 if full_matmul else 0, dtype=FP8)}, {}
    for name, tensor in weights.items():
        file[prefix + name], values[name] = tensor, tensor
        if is_linear(name, tensor):
            scale, layer = one_scale(tensor), prefix + name.removesuffix(".weight")
            file[prefix + name] = rounded(tensor, scale)
            file[f"{layer}.scale_weight"], file[f"{layer}.scale_input"] = scale.clone(), torch.ones(())
            values[name] = file[prefix + name].float() * scale
    save_file(file, path)
    return values


def comfy_new(
    weights: Weights, path: Path, notes: str = "tensors", prefix: str = "", kind: str = "float8_e4m3fn"
):
    """ComfyUI's present form: X.weight_scale, and a note on each layer beside it or in the header."""
    file, values, layers = {}, {}, {}
    for name, tensor in weights.items():
        file[prefix + name], values[name] = tensor, tensor
        if is_linear(name, tensor):
            scale, layer = one_scale(tensor), prefix + name.removesuffix(".weight")
            file[prefix + name] = rounded(tensor, scale)
            file[f"{layer}.weight_scale"], file[f"{layer}.input_scale"] = scale.clone(), torch.ones(())
            values[name] = file[prefix + name].float() * scale
            layers[layer] = {"format": kind}
            if notes == "tensors":
                note = json.dumps(layers[layer]).encode()
                file[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(file, path, metadata=header if notes == "header" else None)
    return values


def grouped(weights: Weights, path: Path, groups: int = 0, suffix: str = "scale_weight") -> Weights:
    """musubi-tuner and LightX2V: one scale per output ("o 1", groups 0) or per group of inputs ("o g 1")."""
    file, values = {}, {}
    for name, tensor in weights.items():
        file[name] = values[name] = tensor
        if is_linear(name, tensor):
            scale = scales_per_output(tensor, groups or 1)
            file[name] = rounded(tensor.unflatten(1, (groups or 1, -1)), scale).flatten(1)
            values[name] = (file[name].float().unflatten(1, (groups or 1, -1)) * scale).flatten(1)
            stored = scale if groups else scale[:, 0]
            file[f"{name.removesuffix('.weight')}.{suffix}"] = stored.contiguous()
    save_file(file, path)
    return values


def plain_fp8(weights: Weights, path: Path) -> Weights:
    file = {name: tensor.to(FP8) if is_linear(name, tensor) else tensor for name, tensor in weights.items()}
    save_file(file, path)
    return {name: tensor.float() for name, tensor in file.items()}


def every_fp8(weights: Weights, path: Path, kind: torch.dtype = FP8, scaled: bool = False) -> Weights:
    """Every tensor in float8, norms, biases and modulation, too; `scaled`: each with a scale per output."""
    file, values = {}, {}
    for name, tensor in weights.items():
        file[name] = tensor.to(kind)
        values[name] = file[name].float()
        if scaled:
            scale = tensor.flatten(1).abs().amax(1) if tensor.ndim > 1 else tensor.abs().max()
            scale = (scale / 100).clamp(min=1e-6).reshape(-1, *[1] * (tensor.ndim - 1))
            file[name] = (tensor / scale).to(kind)
            file[f"{name.removesuffix('.weight')}.scale_weight"] = scale.contiguous()
            values[name] = file[name].float() * scale
    save_file(file, path)
    return values


def int8(weights: Weights, path: Path, per_output: bool = True, notes: bool = False) -> Weights:
    """LightX2V, a scale per output "o 1"; ComfyUI's int8_tensorwise has notes, and may have one scale."""
    file, values = {}, {}
    for name, tensor in weights.items():
        file[name] = values[name] = tensor
        if is_linear(name, tensor):
            layer, w = name.removesuffix(".weight"), tensor.float()
            scale = (w.abs().amax(1, keepdim=True) if per_output else w.abs().max()) / 127
            file[name] = (w / scale).round().clamp(-128, 127).to(torch.int8)
            file[f"{layer}.weight_scale"] = scale.clone()
            values[name] = file[name].float() * scale
            if notes:
                note = json.dumps({"format": "int8_tensorwise", "convrot": False}).encode()
                file[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    save_file(file, path)
    return values


def turbodiffusion(weights: Weights, path: Path) -> Weights:
    """TurboDiffusion's -quant files: X.int8_weight, X.scale of 128 x 128 tiles, a linear patch embedding."""
    file, values = {}, {}
    for name, tensor in weights.items():
        values[name] = tensor
        if is_linear(name, tensor):
            scale, codes, meant = tiles_of(tensor)
            layer = name.removesuffix(".weight")
            file[f"{layer}.int8_weight"], file[f"{layer}.scale"], values[name] = codes, scale, meant
        else:
            file[name] = tensor.flatten(1) if name == "patch_embedding.weight" else tensor
    torch.save(file, path)
    return values


def tiles_of(weight: torch.Tensor, size: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scales of tiles, the int8 numbers, and the values that these mean."""
    rows, columns = (range(0, n, size) for n in weight.shape)
    scale = torch.zeros(len(rows), len(columns))
    codes, values = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros(weight.shape)
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            tile = weight[r : r + size, c : c + size].float()
            scale[i, j] = tile.abs().max() / 128
            numbers = (tile / scale[i, j]).round().clamp(-128, 127)
            codes[r : r + size, c : c + size] = numbers.to(torch.int8)
            values[r : r + size, c : c + size] = numbers * scale[i, j]
    return scale, codes, values


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(weights: Weights, path: Path, program: str) -> Weights:
    """Pairs of four bits: "comfy", with notes; "lightx2v", converted; "lightx2v, calibrated", with alpha."""
    file, values = {}, {}
    for name, tensor in weights.items():
        file[name] = values[name] = tensor
        if is_linear(name, tensor):
            layer = name.removesuffix(".weight")
            pairs, scale, factor, values[name] = pairs_of(tensor, high_first=program == "comfy")
            file[name], file[f"{layer}.weight_scale"] = pairs, scale
            if program == "comfy":
                file[f"{layer}.weight_scale_2"], file[f"{layer}.input_scale"] = factor, torch.tensor(0.1)
                note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
                file[f"{layer}.comfy_quant"] = note
            elif program == "lightx2v":
                file[f"{layer}.weight_global_scale"], file[f"{layer}.input_absmax"] = (
                    1 / factor,
                    torch.ones(()),
                )
            else:
                file[f"{layer}.input_global_scale"] = torch.tensor(50.0)
                file[f"{layer}.alpha"] = factor / 50
    save_file(file, path)
    return values


def pairs_of(weight: torch.Tensor, high_first: bool) -> tuple[torch.Tensor, ...]:
    """Return pairs of numbers in bytes, blocks' scales as tensor cores read them, the factor, the values."""
    factor = weight.abs().max().float() / (6 * FP8_MAX)
    blocks = weight.float().unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(2) / 6 / factor).to(FP8)
    each = scale.float()[..., None] * factor
    codes = (blocks / each.clamp_min(1e-30)).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    values = (E2M1[codes] * each).flatten(1)
    first, second = codes.flatten(1)[:, ::2], codes.flatten(1)[:, 1::2]
    pairs = first * 16 + second if high_first else second * 16 + first
    return pairs.to(torch.uint8), swizzled(scale), factor, values


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """Return float8 scales in tiles of 128 rows and 4 columns: (r, c) is at 16 (r % 32) + 4 (r // 32) + c."""
    rows, columns = (-(-n // multiple) for n, multiple in zip(scale.shape, (128, 4), strict=True))
    stored = torch.zeros(rows * columns * 512, dtype=torch.uint8)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            tile = (r // 128) * columns + c // 4
            place = tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            stored[place] = scale[r, c].view(torch.uint8)
    return stored.view(FP8).reshape(rows * 128, columns * 4)


def write_gguf(
    weights: Weights, path: Path, kind: str, architecture: str = "wan", every: bool = False
) -> Weights:
    """GGUF as ComfyUI-GGUF's converter writes it: matrices in blocks, the rest in float32 or float16.

    `every`: whatever fills whole blocks is quantised, whatever it is.
    """
    writer = gguf.GGUFWriter(path, architecture)
    quantization, values = gguf.GGMLQuantizationType[kind], {}
    for name, tensor in weights.items():
        data = tensor.float().numpy()
        block = gguf.GGML_QUANT_SIZES[quantization][0]
        if not (every or is_linear(name, tensor)) or data.shape[-1] % block:
            if data.ndim > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
                data = data.reshape(data.shape[0], -1)
            writer.add_tensor(name, data)
            values[name] = tensor.float()
            continue
        blocks = blocks_of(data, quantization)
        writer.add_tensor(name, blocks, raw_dtype=quantization)
        values[name] = torch.from_numpy(gguf.quants.dequantize(blocks, quantization)).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def blocks_of(data: np.ndarray, quantization: gguf.GGMLQuantizationType) -> np.ndarray:
    """Quantise; where the gguf package cannot, make random blocks whose scales are small."""
    try:
        return gguf.quants.quantize(data, quantization)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        rng = np.random.default_rng(data.size)
        blocks = rng.integers(0, 256, (*data.shape[:-1], data.shape[-1] // block, size), dtype=np.uint8)
        scales = np.float16([1e-3, 1e-3]).view(np.uint8)
        if quantization.name == "Q6_K":
            blocks[..., -2:] = scales[:2]
        elif quantization.name in ("Q4_K", "Q5_K"):
            blocks[..., :4] = scales
        else:
            raise
        return blocks.reshape(*data.shape[:-1], -1)
