"""Files that we write: aligned, and read by safetensors' own functions."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wan22.checkpoints.files import safetensors as module
from wan22.checkpoints.files.safetensors import ALIGNMENT, StoredTensor, read_header, write_safetensors


def table(long_name=""):
    """Sizes that fill whole multiples of the alignment, and others."""
    return {
        f"odd.bias{long_name}": torch.randn(3),
        "matrix": torch.randn(16, 32).bfloat16(),
        "odd.bytes": torch.randn(5, 7).to(torch.float8_e4m3fn),
        "float8": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "odd.half": torch.randn(5).half(),
        "double": torch.randn(8).double(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.0),
    }


@pytest.mark.parametrize("length", range(0, 70, 7))
def test_every_tensor_of_whole_multiples_is_aligned(length, tmp_path):
    tensors, path = table("x" * length), tmp_path / "w.safetensors"
    write_safetensors(path, [StoredTensor(*item) for item in tensors.items()])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(module.as_bytes(found[name]), module.as_bytes(tensor))
        assert found[name].data_ptr() % tensor.dtype.itemsize == 0 or not tensor.nbytes
        if tensor.nbytes % ALIGNMENT == 0 and tensor.nbytes:
            assert found[name].data_ptr() % ALIGNMENT == 0, name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_bytes = path.stat().st_size - sum(tensor.nbytes for tensor in tensors.values())
    assert header_bytes % ALIGNMENT == 0
    assert read_header(path)[0].keys() == tensors.keys()


def test_a_file_that_cannot_be_finished_is_removed(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "w.safetensors", [StoredTensor("a", torch.ones(4))])
    assert not list(tmp_path.iterdir())
