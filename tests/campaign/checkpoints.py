"""Weight files, checkpoint folders and LoRAs with random damage: refused, or what they were."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.builders import latents_of
from tests.campaign.isolation import Trial
from tests.campaign.mutations import damages, documents
from tests.checkpoints import lora_writers, writers
from wan22 import WanT2VPipeline, WanTransformer3DModel, tiny_checkpoint

TINY = tiny_checkpoint("t2v")
SHORT = {"num_inference_steps": 1, "height": 32, "width": 32, "num_frames": 5}
SIZES = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 256, "num_layers": 1, "text_dim": 64}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return what tells tensors with their names from others."""
    told = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        told.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.detach().float().numpy().tobytes())
    return told.hexdigest()


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a file's header and its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def safetensors_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def warnings_of(name: str) -> list[str]:
    """Return a list to which a logger's warnings are appended from now on."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.disable(logging.NOTSET)
    logging.getLogger(name).addHandler(handler)
    return told


class WeightFiles:
    """A transformer's file in each format: its header or its pickle is changed, or the file is cut off."""

    name = "weight files"

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        weights = WanTransformer3DModel(**SIZES, freq_dim=32).state_dict()
        paths = {ending: folder / f"whole.{ending}" for ending in ("safetensors", "pth", "gguf")}
        writers.comfy_old({name: t.clone() for name, t in weights.items()}, folder / "fp8.safetensors")
        save_file(weights, paths["safetensors"])
        torch.save(weights, paths["pth"])
        writers.write_gguf(weights, paths["gguf"], "Q8_0")
        self.tensors = list(weights)
        self.files = {"fp8.safetensors": folder / "fp8.safetensors"} | {p.name: p for p in paths.values()}
        self.data = {name: path.read_bytes() for name, path in self.files.items()}
        self.whole = {name: self.load(path) for name, path in self.files.items()}

    @staticmethod
    def load(path: Path) -> str:
        model = WanTransformer3DModel.from_single_file(path, dtype=torch.float32, dequantize=True)
        return digest(model.state_dict())

    def parts(self, name: str) -> list[tuple[int, int]]:
        """Return where a change cannot pass for another value of a weight."""
        data = self.data[name]
        if name.endswith("safetensors"):
            return [(0, 8), (8, 8 + int.from_bytes(data[:8], "little"))]
        if name.endswith("pth"):
            return [(0, data.index(b"/data/0")), (data.index(b"PK\x01\x02"), len(data))]
        return [(0, 200), (0, max(data.rindex(tensor.encode()) for tensor in self.tensors))]

    def cases(self) -> st.SearchStrategy[Any]:
        def of(name: str) -> st.SearchStrategy[Any]:
            ways = damages(self.parts(name)).map(lambda change: (name, change(self.data[name])))
            if name.endswith("safetensors"):
                header, data = split_safetensors(self.data[name])
                ways |= documents(header).map(lambda text: (name, safetensors_of(text, data)))
            return ways

        return st.sampled_from(sorted(self.files)).flatmap(of)

    def trial(self, case: tuple[str, bytes], folder: Path) -> Trial:
        name, data = case
        path = folder / f"damaged.{name.rpartition('.')[2]}"

        def run() -> str | None:
            path.write_bytes(data)
            same = self.load(path) in (self.whole[name], self.whole["whole.safetensors"])
            return None if same else f"{name}: other weights"

        return Trial(run, path.name)


class Folders:
    """A checkpoint's folder of which one JSON file is changed: refused, or it makes a video."""

    name = "configs and indexes"

    def __init__(self, folder: Path) -> None:
        self.texts = {str(path.relative_to(TINY)): path.read_bytes() for path in sorted(TINY.rglob("*.json"))}

    def cases(self) -> st.SearchStrategy[Any]:
        def of(name: str) -> st.SearchStrategy[Any]:
            text = self.texts[name]
            flips = damages([(0, len(text))]).map(lambda change: (name, change(text)))
            if len(text) > 10**5:  # a vocabulary: its words are anyone's choice
                return flips
            return flips | documents(json.loads(text)).map(lambda changed: (name, changed))

        return st.sampled_from(sorted(self.texts)).flatmap(of)

    def trial(self, case: tuple[str, bytes], folder: Path) -> Trial:
        name, text = case
        place = folder / "checkpoint"

        def run() -> str | None:
            shutil.copytree(TINY, place, copy_function=os.symlink)
            (place / name).unlink()
            (place / name).write_bytes(text)
            pipe = WanT2VPipeline.from_pretrained(place)
            found = latents_of(
                pipe, num_inference_steps=1, height=32, width=32, num_frames=5, output_type="pt"
            )
            return None if bool(torch.isfinite(found).all()) else f"{name}: latents that are not finite"

        return Trial(run, place.name)


class Loras:
    """A LoRA with changed names, ranks, shapes or values: refused, or it changes the video, or says not."""

    name = "LoRAs"

    def __init__(self, folder: Path) -> None:
        self.pipe = WanT2VPipeline.from_pretrained(TINY)
        path = folder / "lora.safetensors"
        lora_writers.save_one_layer(self.pipe, path)
        self.tensors, self.data = load_file(path), path.read_bytes()
        self.before = self.latents()

    def latents(self) -> torch.Tensor:
        return latents_of(self.pipe, output_type="pt", **SHORT)

    def cases(self) -> st.SearchStrategy[Any]:
        header, data = split_safetensors(self.data)
        values = st.sampled_from((float("nan"), float("inf"), 0.0, 1e38))
        kinds = st.sampled_from((torch.int8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn))
        change = st.one_of(
            values.map(lambda value: lambda t: torch.full_like(t, value)),
            kinds.map(lambda kind: lambda t: t.to(kind)),
            st.integers(0, 3).map(lambda rows: lambda t: t[:rows].clone()),
            st.integers(0, 3).map(lambda axes: lambda t: t.reshape((1,) * axes + tuple(t.shape))),
            st.just(lambda t: None),
        )
        changed = st.tuples(st.sampled_from(sorted(self.tensors)), change)
        return changed | documents(header).map(lambda text: safetensors_of(text, data))

    def trial(self, case: Any, folder: Path) -> Trial:
        path = folder / "damaged.safetensors"

        def run() -> str | None:
            if isinstance(case, bytes):
                path.write_bytes(case)
            else:
                name, change = case
                tensors = {**self.tensors, name: change(self.tensors[name])}
                save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)
            told = warnings_of("wan22")
            self.pipe.load_lora_weights(path)
            try:
                found = self.latents()
            except FloatingPointError:  # finite weights that are too large: the call says so
                return None
            nil = torch.equal(found, self.before) and not any("changes nothing" in text for text in told)
            return "no effect" if nil else None

        return Trial(run, path.name)
