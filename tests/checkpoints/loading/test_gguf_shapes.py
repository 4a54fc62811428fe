"""GGUF has room for four axes: converters merge the patch embedding's, or write down its own shape."""

import gguf
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.loading.test_models import assert_same, official, plain  # noqa: F401
from wan22 import WanTransformer3DModel
from wan22.checkpoints import convert
from wan22.checkpoints.files.quantized import unflattened

PATCH, DIM = "patch_embedding.weight", 256


def write(weights, path, shapes=(), kinds=(), notes=()):
    """Write all tensors in float32, but for some in other shapes, or in blocks of a kind."""
    writer, values = gguf.GGUFWriter(path, "wan"), {}
    for name, tensor in weights.items():
        data = tensor.float().numpy().reshape(dict(shapes).get(name, tensor.shape))
        values[name] = tensor.float()
        if name in notes:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        if kind := dict(kinds).get(name):
            kind = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quants.quantize(data, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            values[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).reshape(tensor.shape)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


# ComfyUI-GGUF with its fix, stable-diffusion.cpp, and converters that merge all axes or leave out the first.
SHAPES = {
    "five axes": (DIM, 16, 1, 2, 2),
    "outputs and channels": (DIM * 16, 1, 2, 2),
    "matrix": (DIM, 64),
    "without time": (DIM, 16, 2, 2),
    "one": (DIM * 64,),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_patch_embedding(official, shape, tmp_path):  # noqa: F811
    shapes = {PATCH: SHAPES[shape]}
    write(official, tmp_path / "w.gguf", shapes)
    assert_same(WanTransformer3DModel.from_single_file(tmp_path / "w.gguf"), plain(official))


@pytest.mark.parametrize("noted", [False, True])
def test_a_quantised_patch_embedding(official, noted, tmp_path):  # noqa: F811
    values = write(
        official, tmp_path / "w.gguf", {PATCH: (DIM, 64)}, {PATCH: "Q8_0"}, [PATCH] if noted else ()
    )
    model = WanTransformer3DModel.from_single_file(tmp_path / "w.gguf", dtype=torch.float32)
    torch.testing.assert_close(model.patch_embedding.weight, values[PATCH], rtol=1e-6, atol=0)


def test_axes_with_one_entry_may_be_left_out(official, tmp_path):  # noqa: F811
    shapes = {"blocks.0.modulation": (6, DIM), "blocks.1.modulation": (6, DIM), "head.modulation": (2, DIM)}
    write(official, tmp_path / "w.gguf", shapes)
    assert_same(WanTransformer3DModel.from_single_file(tmp_path / "w.gguf"), plain(official))
    convert(tmp_path / "w.gguf", tmp_path / "w.safetensors", "single-file")
    written = load_file(tmp_path / "w.safetensors")
    assert torch.equal(written["blocks.0.modulation"], official["blocks.0.modulation"])


def test_a_shape_that_does_not_fit_is_named(official, tmp_path):  # noqa: F811
    write(official | {PATCH: torch.ones(DIM, 63)}, tmp_path / "w.gguf")
    with pytest.raises(ValueError, match=r"patch_embedding\.weight of shape \(256, 63\)"):
        WanTransformer3DModel.from_single_file(tmp_path / "w.gguf")
    write(official, tmp_path / "w.gguf", {"blocks.1.ffn.0.weight": (DIM, 512)})
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.0\.proj\.weight is \(256, 512\), it must be"):
        WanTransformer3DModel.from_single_file(tmp_path / "w.gguf")


def test_only_merged_axes_are_split():
    values = torch.arange(24.0)
    assert unflattened(values.reshape(6, 4), (2, 3, 4)).shape == (2, 3, 4)
    assert unflattened(values.reshape(2, 12), (1, 2, 3, 4)).shape == (1, 2, 3, 4)
    assert unflattened(values.reshape(4, 6), (2, 3, 4)).shape == (4, 6), "other values would be neighbours"
    assert unflattened(values.reshape(6, 4), (4, 6)).shape == (6, 4)
    assert unflattened(values.reshape(6, 4), (6, 5)).shape == (6, 4)
