"""Makes a short video on the CPU with a transformer of 1.6 to 3.2 billion parameters, within host memory.

    python -m tests.accel.planning.real_memory FOLDER FORM RAM

Prints what was planned, and what the process took, of anonymous memory and of mapped files. The weights are
zeros.
"""

import json
import sys
import threading
import time
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.writers import FP8, is_linear
from wan22 import AutoencoderKLWan, FlowMatchUniPCScheduler, WanT2VPipeline, WanTransformer3DModel
from wan22.accel.offload.layout import bytes_of
from wan22.accel.offload.offloader import free
from wan22.checkpoints.deferred import deferring

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
SIZE = {"height": 64, "width": 64, "num_frames": 5}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write meta tensors as zeros that take no disk, others as they are, 16 bytes behind a multiple of 64."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        place = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * ((8 - len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(tensor.numpy().tobytes())


def in_dtype(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_scaled_fp8(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As ComfyUI's first fp8_scaled."""
    file = {"scaled_fp8": torch.empty(0, dtype=FP8, device="meta")}
    for name, tensor in in_dtype(tensors, torch.bfloat16).items():
        file[name] = tensor
        if is_linear(name, tensor):
            file[name] = tensor.to(FP8)
            file[f"{name.removesuffix('.weight')}.scale_weight"] = torch.ones(())
    write_safetensors(path, file)


def write_gguf(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Q8_0 blocks; NumPy's zeros take no memory until they are written to."""
    kind = gguf.GGMLQuantizationType.Q8_0
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if is_linear(name, tensor):
            blocks = np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            continue
        if len(shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
            shape = [shape[0], prod(shape[1:])]
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_pth(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """In float32: PyTorch's zeros take no memory until they are written to."""
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}, path)


# By form: the file's name, its blocks, so that it has at least 3 GB, and what writes it.
FORMS: dict[str, tuple[str, int, Any]] = {
    "float32": ("model.safetensors", 24, write_safetensors),
    "bfloat16": (
        "model.safetensors",
        24,
        lambda path, tensors: write_safetensors(path, in_dtype(tensors, torch.bfloat16)),
    ),
    "scaled_fp8": ("model.safetensors", 48, write_scaled_fp8),
    "gguf": ("model.gguf", 48, write_gguf),
    "pth": ("model.pth", 24, write_pth),
}


def taken() -> dict[str, int]:
    """Bytes that this process takes of memory, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}


def main(folder: str, form: str, ram: str) -> dict[str, Any]:
    """Write the file, plan, make the video."""
    name, layers, write = FORMS[form]
    path = Path(folder, name)
    sizes = {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": 8192}
    with torch.device("meta"):
        model, vae = WanTransformer3DModel(**sizes, text_dim=64), AutoencoderKLWan()
    write(path, model.state_dict())
    latents_of(random_pipeline(), output_type="np")  # so that all code is loaded
    vae = vae.to_empty(device="cpu").eval()
    for parameter in vae.parameters():
        parameter.data.zero_()
    free()
    before = taken()
    before["RssAnon"] -= sum(parameter.nbytes for parameter in vae.parameters())
    with deferring():
        model = WanTransformer3DModel.from_single_file(path, dtype=torch.bfloat16)
    pipe = WanT2VPipeline(None, None, vae, FlowMatchUniPCScheduler(), model)
    pipe.set_progress_bar_config(disable=True)
    plan = pipe.fit(ram=float(ram), device="cpu", **SIZE)
    peaks, running = dict(before), True

    def watch() -> None:
        while running:
            peaks.update({kind: max(peaks[kind], nbytes) for kind, nbytes in taken().items()})
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    embeds = torch.randn(1, 20, 64)
    pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, **SIZE, num_inference_steps=1, seed=0)
    running = False
    thread.join()
    return {
        "kind": plan.placements["transformer"].kind,
        "all": bytes_of(model),
        "planned": {"anonymous": plan.host, "mapped": plan.mapped},
        "measured": {
            "anonymous": peaks["RssAnon"] - before["RssAnon"],
            "mapped": peaks["RssFile"] - before["RssFile"],
        },
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
