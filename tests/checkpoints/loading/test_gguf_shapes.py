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
    with pytest.raises(
        ValueError, match=r"patch_embedding\.weight is \(256, 63\), which is not for 256 outputs"
    ):
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


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ([255, 256], r"its shape, \[255, 256\], is not that of 131072 values"),
        (7, "its shape, 7, is not that"),
    ],
)
def test_a_noted_shape_that_is_wrong(official, note, message, tmp_path):  # noqa: F811
    name, writer = "blocks.0.ffn.0.weight", gguf.GGUFWriter(tmp_path / "w.gguf", "wan")
    if isinstance(note, list):
        writer.add_array(f"comfy.gguf.orig_shape.{name}", note)
    else:
        writer.add_uint32(f"comfy.gguf.orig_shape.{name}", note)
    writer.add_tensor(name, official[name].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        WanTransformer3DModel.from_single_file(tmp_path / "w.gguf")


def test_tensors_that_overlap_are_refused(tmp_path):
    weights = {name: torch.full((4, 64), value) for name, value in (("first", 1.0), ("second", 2.0))}
    write(weights, tmp_path / "w.gguf")
    data = bytearray((tmp_path / "w.gguf").read_bytes())
    place = (
        data.index(b"second") + len("second") + 4 + 2 * 8 + 4
    )  # axes, sizes and kind come before its offset
    data[place : place + 8] = bytes(8)
    (tmp_path / "w.gguf").write_bytes(data)
    message = r"w\.gguf is damaged: (first overlaps second|second overlaps first)"
    with pytest.raises(ValueError, match=message):
        WanTransformer3DModel.from_single_file(tmp_path / "w.gguf")
