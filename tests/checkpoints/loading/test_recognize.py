"""What a file says without its weights: the kind of model, its configuration, and the dtypes it loads in."""

import json
import math
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.builders import golden_text_encoder
from tests.checkpoints import writers
from tests.checkpoints.loading.test_image_encoder import model as clip  # noqa: F401
from tests.checkpoints.loading.test_image_encoder import official_clip
from tests.checkpoints.loading.test_models import FORMS, official, official_name  # noqa: F401
from tests.checkpoints.loading.test_text_encoder import gguf_name
from tests.golden_data import golden
from wan22 import WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.loading.recognize import read_model
from wan22.checkpoints.quantized_linear import QuantizedLinear


def without_values(model):
    """Every weight's shape and dtype, and every quantised layer's dtype and format."""
    weights = {name: (w.shape, w.dtype) for name, w in model.state_dict().items()}
    quantized = {
        name: (m.dtype, m.format) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)
    }
    return weights, quantized


def check(path, kind, named=None):
    """The model on the meta device is the one that is loaded, in every dtype that may be asked for."""
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        for dequantize in (False, True):
            stored = read_model(path, named)
            assert stored.kind == kind
            meta, loaded = stored.meta_model(dtype, dequantize), stored.load(dtype, dequantize)
            assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
            assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
            assert without_values(meta) == without_values(loaded)
            assert type(meta) is type(loaded)
            assert not meta.training


@pytest.mark.parametrize("form", FORMS)
def test_transformers(official, form, tmp_path):  # noqa: F811
    FORMS[form](official, tmp_path / "weights")
    check(tmp_path / "weights", "transformer")


def test_a_transformer_as_pth_and_in_shards(official, tmp_path):  # noqa: F811
    torch.save(official, tmp_path / "w.pth")
    check(tmp_path / "w.pth", "transformer")
    (folder := tmp_path / "shards").mkdir()
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(official)}
    for file in set(places.values()):
        save_file({n: w for n, w in official.items() if places[n] == file}, folder / file)
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {"_class_name": "WanModel", "dim": 256, "num_heads": 4, "eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    check(folder, "transformer")
    assert read_model(folder).settings["num_attention_heads"] == 4
    assert read_model(folder).settings["eps"] == 1e-5
    assert read_model(folder, config={}).settings["num_attention_heads"] == 2


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_the_diffusers_layout(component):
    folder = tiny_checkpoint() / component
    check(folder, component)
    config = json.loads((folder / "config.json").read_text())
    settings = read_model(folder).settings
    assert {name: settings[name] for name in config if not name.startswith("_") and name in settings} == {
        name: value for name, value in config.items() if not name.startswith("_") and name in settings
    }


@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_autoencoders(name, tmp_path):
    torch.save(golden(name).weights, tmp_path / "Wan_VAE.pth")
    check(tmp_path / "Wan_VAE.pth", "vae")


def test_text_encoders(tmp_path):
    weights = golden("t5").weights
    torch.save(weights, tmp_path / "w.pth")
    writers.write_gguf({gguf_name(n): w for n, w in weights.items()}, tmp_path / "w.gguf", "F16", "t5encoder")
    golden_text_encoder().save_pretrained(tmp_path / "folder")
    for name in ("w.pth", "w.gguf", "folder"):
        check(tmp_path / name, "text_encoder")


def test_image_encoders(clip, tmp_path):  # noqa: F811
    torch.save(official_clip(clip), tmp_path / "models_clip.pth")
    clip.save_pretrained(tmp_path / "folder")
    for name in ("models_clip.pth", "folder"):
        check(tmp_path / name, "image_encoder", named="image_encoder")
    loaded = read_model(tmp_path / "folder", kind="image_encoder").load()
    image = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(loaded(image).last_hidden_state, clip(image).last_hidden_state)


# ---- weights are not read ----


def released_shapes():
    """The official names and shapes of a tenth of an A14B expert."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=40, ffn_dim=13824, num_layers=4)
    return {official_name(name): tuple(w.shape) for name, w in model.state_dict().items()}


def write_safetensors(shapes, path):
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def write_pth(shapes, path):
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)


def write_gguf(shapes, path):
    writer, end = gguf.GGUFWriter(path, "wan"), 0
    for name, shape in shapes.items():
        quantized = writers.is_linear(name, torch.empty(shape, device="meta"))
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        size = math.prod(shape) * 34 // 32 if quantized else 4 * math.prod(shape)
        if len(shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            shape = (shape[0], math.prod(shape[1:]))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 32 + end)


def resident():
    """Bytes of memory that the process has, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("write", [write_safetensors, write_pth, write_gguf])
def test_no_weights_are_read(write, tmp_path):
    """A file of gigabytes, nearly all of it a hole, costs no memory before it is loaded."""
    write(released_shapes(), tmp_path / "w")
    assert (tmp_path / "w").stat().st_size > 1.5e9
    before = resident()
    stored = read_model(tmp_path / "w")
    model = stored.meta_model()
    assert resident() - before < 100e6
    assert stored.kind == "transformer"
    assert stored.settings["num_layers"] == len(model.blocks) == 4
    assert sum(stored.sizes.values()) > 1.5e9
