"""What a weight file's header tells."""

import json

import pytest
import torch
from safetensors.torch import save_file

from wan22.checkpoints.formats import read_header, stored_dtype

WEIGHTS = {
    "a.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
    "b": torch.zeros(3, dtype=torch.float32),
    "c": torch.zeros(5, dtype=torch.int64),
}


def test_read_header(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "w.safetensors")
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
    assert read_header(tmp_path / "w.safetensors").keys() == WEIGHTS.keys()


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
