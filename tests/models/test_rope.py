"""Rotary tables and time embeddings where the device has no float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan22.accel.vae import _faster_contiguous
from wan22.models import rope
from wan22.models.embeddings import sinusoidal_embedding

META = torch.device("meta")


class WithoutFloat64(TorchDispatchMode):
    """The meta device, as one that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                assert tensor.device.type != "meta", f"{function} makes float64 on the device"
        return out


def made(device):
    times = torch.tensor([937.25, 3.0], device=device)
    return (*rope.rotary_tables((3, 4, 5), 32, device), sinusoidal_embedding(times, 16))


def test_without_float64(monkeypatch):
    with pytest.raises(AssertionError, match="makes float64"), WithoutFloat64():
        made(META)
    monkeypatch.setattr(rope, "WITHOUT_FLOAT64", ("meta",))
    with WithoutFloat64():
        tables = rope.rotary_tables((3, 4, 5), 32, META)
    assert all(table.device == META and table.dtype == torch.float32 for table in tables)


def test_tables_made_on_the_cpu_are_the_same(monkeypatch):
    cpu = torch.device("cpu")
    expected = made(cpu)
    monkeypatch.setattr(rope, "float64_device", lambda device: torch.device("cpu"))
    for table, e in zip(made(cpu), expected, strict=True):
        assert torch.equal(table, e)


def test_tables_are_the_angles_of_the_grid():
    cos, sin = rope.rotary_tables((3, 4, 5), 32, torch.device("cpu"), torch.float64)
    assert cos.shape == (1, 60, 1, 16)
    token, sizes = 1 * 20 + 2 * 5 + 3, rope.axis_sizes(32)  # frame 1, row 2, column 3
    angles = [
        place * rope.THETA ** -(2 * i / size)
        for place, size in zip((1, 2, 3), sizes, strict=True)
        for i in range(size // 2)
    ]
    angle = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(cos[0, token, 0], angle.cos(), rtol=0, atol=1e-14)
    torch.testing.assert_close(sin[0, token, 0], angle.sin(), rtol=0, atol=1e-14)


def test_channels_stay_outermost_on_mps():
    assert _faster_contiguous(torch.empty(8, 8, 3, 3, 3, dtype=torch.bfloat16), torch.device("mps"))
