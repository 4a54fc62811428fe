"""GGUF has room for four axes: converters merge the patch embedding's, or write down its own shape."""

import struct
import time

import gguf
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.loading.test_models import assert_same, official, plain  # noqa: F401
from wan22 import WanTransformer3DModel
from wan22.checkpoints import convert
from wan22.checkpoints.files.quantized import unflattened
from wan22.checkpoints.files.weights import read_weights

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


def field(name, kind, content):
    """An entry of the metadata, as the file has it."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content


def with_fields(path, weights, *fields):
    """Put entries in front of those of a file."""
    write(weights, path)
    data = path.read_bytes()
    tensors, entries = struct.unpack_from("<QQ", data, 8)
    reader = gguf.GGUFReader(path)
    end = max(t.field.offset + sum(p.nbytes for p in t.field.parts) for t in reader.tensors)
    head = data[:8] + struct.pack("<QQ", tensors, entries + len(fields)) + b"".join(fields) + data[24:end]
    path.write_bytes(head + bytes(-len(head) % 32) + data[reader.data_offset :])


ARRAY, U8, TEXT = 9, 0, 8
# What a header may claim: the file does not have it, or nobody needs it.
CLAIMS = {
    "2**60 numbers": field("x", ARRAY, struct.pack("<IQ", U8, 2**60)),
    "2**40 texts": field("x", ARRAY, struct.pack("<IQ", TEXT, 2**40)),
    "arrays in an array": field("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000),
    "a text of 2**62 bytes": field("x", TEXT, struct.pack("<Q", 2**62)),
    "a kind of the future": field("x", 99, b""),
    "an alignment of 3": field("general.alignment", 4, struct.pack("<I", 3)),
    "an alignment that is a text": field("general.alignment", TEXT, struct.pack("<Q", 1) + b"8"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_header_that_claims_too_much_is_refused_at_once(what, tmp_path):
    with_fields(tmp_path / "w.gguf", {"a": torch.ones(4, 64)}, CLAIMS[what])
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"w\.gguf is cut off or damaged: ") as error:
        read_weights(tmp_path / "w.gguf")
    assert time.monotonic() - started < 1 and "\n" not in str(error.value)


def test_long_arrays_are_passed_over(tmp_path):
    numbers = field("x", ARRAY, struct.pack("<IQ", U8, 10**7) + bytes(10**7))
    words = field("y", ARRAY, struct.pack("<IQ", TEXT, 10**4) + (struct.pack("<Q", 1) + b"a") * 10**4)
    weights = {"a": torch.arange(256.0).view(4, 64)}
    with_fields(tmp_path / "w.gguf", weights, numbers, words, field("z", TEXT, struct.pack("<Q", 1) + b"b"))
    started = time.monotonic()
    file = read_weights(tmp_path / "w.gguf")
    assert time.monotonic() - started < 1
    assert torch.equal(file.tensors["a"], weights["a"])
    assert file.metadata.get("z") == "b" and file.metadata.keys().isdisjoint("xy")


def test_the_axes_of_a_matrix_are_not_merged(official, tmp_path):  # noqa: F811
    name = "blocks.0.self_attn.q.weight"
    write(official, tmp_path / "w.gguf", {name: (DIM * DIM,)})
    with pytest.raises(ValueError, match=r"attn1\.to_q\.weight is \(65536,\), it must be \(256, 256\)"):
        WanTransformer3DModel.from_single_file(tmp_path / "w.gguf")


def test_names_in_errors_are_escaped(tmp_path):
    """A terminal finds nothing to obey in what a stranger has called an entry."""
    name = b"ge\x1b[31m"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(name)) + name
    (tmp_path / "w.gguf").write_bytes(head + struct.pack("<IQ", 8, 2**60) + bytes(64))
    with pytest.raises(ValueError, match=r"w\.gguf is cut off or damaged: its entry ge\\x1b\[31m: a text"):
        read_weights(tmp_path / "w.gguf")
