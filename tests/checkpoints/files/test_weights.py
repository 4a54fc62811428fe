"""What a weight file's header tells."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import writers
from wan22.checkpoints.files.quantized import expanded
from wan22.checkpoints.files.safetensors import read_header, stored_dtype
from wan22.checkpoints.files.weights import read_json, read_weights, shards_of

WEIGHTS = {
    "a.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
    "b": torch.zeros(3, dtype=torch.float32),
    "c": torch.zeros(5, dtype=torch.int64),
}


def test_read_header(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    header, metadata = read_header(tmp_path / "w.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a.weight": ("BF16", [4, 8]),
        "b": ("F32", [3]),
        "c": ("I64", [5]),
    }
    assert sum(end - start for start, end in (e["data_offsets"] for e in header.values())) == 64 + 12 + 40


def test_the_weights_are_not_read(tmp_path):
    """A header is enough, so a file of many gigabytes costs nothing."""
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    assert read_header(tmp_path / "w.safetensors")[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole safetensors file: its header claims 0 of 0 bytes"),
        (b"\x02", "not a whole safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "its header claims 1000 of 10 bytes"),
        ((2**60).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
        ((4).to_bytes(8, "little") + b"abcd", "its header is not JSON"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a table"),
        (
            (500_001).to_bytes(8, "little") + b'{"a":' * 100_000 + b"1",
            "its header is not JSON",
        ),
        ((10).to_bytes(8, "little") + b'{"a":null}', "its header says nothing of use of 'a'"),
        ((18).to_bytes(8, "little") + b'{"a":{"dtype":"F"}}'[:18], "its header is not JSON"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "not a whole safetensors file",
        ),
    ],
)
def test_broken_files(data, message, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_stored_dtype_is_that_of_most_bytes(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16
    save_file({**WEIGHTS, "d": torch.zeros(100)}, tmp_path / "w.safetensors")
    assert stored_dtype(tmp_path) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_dtype(dtype, tmp_path):
    save_file({"a": torch.zeros(4, dtype=dtype)}, tmp_path / "w.safetensors")
    assert stored_dtype(tmp_path) == dtype


def test_stored_dtype_counts_all_shards(tmp_path):
    save_file({"a": torch.zeros(10)}, tmp_path / "w-00001-of-00003.safetensors")
    for i in (2, 3):
        save_file(
            {f"b{i}": torch.zeros(15, dtype=torch.float16)}, tmp_path / f"w-0000{i}-of-00003.safetensors"
        )
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({}))
    assert stored_dtype(tmp_path) == torch.float16


def test_stored_dtype_of_a_variant(tmp_path):
    save_file({"a": torch.zeros(40)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path, "fp16") == torch.float32, "without such a file, the others are loaded"
    save_file({"a": torch.zeros(40, dtype=torch.float16)}, tmp_path / "model.fp16.safetensors")
    assert stored_dtype(tmp_path, "fp16") == torch.float16
    save_file({"a": torch.zeros(40, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16, "without asking for it, a variant does not count"


def test_stored_dtype_without_weights(tmp_path):
    assert stored_dtype(tmp_path) is None
    (tmp_path / "model.bin").write_bytes(b"")
    assert stored_dtype(tmp_path) is None
    save_file({"a": torch.zeros(4, dtype=torch.int64)}, tmp_path / "w.safetensors")
    assert stored_dtype(tmp_path) is None


# ---- whole files ----


def test_what_a_file_is_does_not_depend_on_its_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.pth", metadata={"who": "me"})
    torch.save({"b": WEIGHTS["b"]}, tmp_path / "w.gguf")
    torch.save({"b": WEIGHTS["b"]}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    file = read_weights(tmp_path / "w.pth")
    assert file.metadata == {"who": "me"}
    assert {name: tensor.dtype for name, tensor in file.tensors.items()} == {
        name: tensor.dtype for name, tensor in WEIGHTS.items()
    }
    for name in ("w.gguf", "old.bin"):
        assert read_weights(tmp_path / name).tensors.keys() == {"b"}


class Code:
    """What a malicious file would hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path):
    for new in (True, False):
        torch.save({"b": Code(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=r"w\.pth holds Python code beside its tensors; it is not run"):
            read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "holds a list"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch', which is no tensor"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_of_other_things(state, message, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "gguf"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_file_that_is_cut_off(kind, share, tmp_path):
    path = tmp_path / "weights"
    weights = {f"blocks.{i}.x.weight": torch.randn(64, 64) for i in range(8)}
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "pth":
        torch.save(weights, path)
    else:
        writers.write_gguf(weights, path, "F16")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"weights is (cut off|not a whole)"):
        read_weights(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"", "neither safetensors"),
        (b"\0" * 100, "neither safetensors"),
    ],
)
def test_a_file_that_is_none(data, message, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_a_folder_must_hold_one_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="found: none"):
        read_weights(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert read_weights(tmp_path).tensors.keys() == {"a"}
    save_file({"b": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found: a\.safetensors, b\.safetensors"):
        read_weights(tmp_path)
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert read_weights(tmp_path).tensors.keys() == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "c": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"names c, which is not in b\.safetensors"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    save_file({"b": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"has a twice, in a\.safetensors and in b\.safetensors"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_weights(tmp_path / "nothing.safetensors")


def test_errors_do_not_tell_what_a_file_holds(tmp_path):
    """A link in a stranger's archive may lead to a private one."""
    (tmp_path / "model.safetensors").write_text("root:secret:0:0")
    with pytest.raises(ValueError, match="neither safetensors, a PyTorch file, nor GGUF") as error:
        read_weights(tmp_path)
    assert "root" not in str(error.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "BF16"])
def test_gguf_values_are_those_of_the_gguf_package(kind, tmp_path):
    weights = {"blocks.0.x.weight": torch.randn(6, 512), "patch.weight": torch.randn(2, 3, 1, 2, 2)}
    expected = writers.write_gguf(weights, tmp_path / "w.gguf", kind)
    tensors = read_weights(tmp_path / "w.gguf").tensors
    for name, values in expected.items():
        assert tuple(tensors[name].shape) == tuple(values.shape)
        torch.testing.assert_close(expanded(tensors[name]).float(), values, rtol=1e-6, atol=1e-6)


def test_gguf_blocks_that_cannot_be_read_are_named(tmp_path):
    weights = {"blocks.0.x.weight": torch.randn(6, 256)}
    writers.write_gguf(weights, tmp_path / "w.gguf", "TQ1_0")
    with pytest.raises(ValueError, match=r"blocks\.0\.x\.weight: blocks of type TQ1_0 cannot .* can: .*Q4_K"):
        read_weights(tmp_path / "w.gguf")


# ---- JSON ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[1]", "holds a list, not a table"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_json_that_is_none_is_named(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json {message}") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "config.json") == {"a": "é"}


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_places(content, tmp_path):
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json is no index of weight files"):
        shards_of(tmp_path / "x.safetensors.index.json")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system maps such files")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """One that takes no disk, either; what is written to its tensors is not written to the file."""
    size = psutil.virtual_memory().total + psutil.swap_memory().total + 2**30 & ~7
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    tensor = read_weights(tmp_path / "w.safetensors").tensors["a"]
    tensor[-1] = 1
    assert (tensor.shape, float(tensor[-1]), float(tensor[0])) == ((size // 4,), 1, 0)
    assert float(read_weights(tmp_path / "w.safetensors").tensors["a"][-1]) == 0
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with (tmp_path / "w.pth").open("r+b") as file:
        file.truncate(size)
    with pytest.raises((MemoryError, ValueError), match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")
