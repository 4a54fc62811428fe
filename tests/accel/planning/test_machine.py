"""What there is on a machine, and what of it is free."""

import psutil
import pytest
import torch

from wan22 import host_memory
from wan22.accel.planning import machine
from wan22.accel.planning.machine import Machine
from wan22.host_memory import available_ram


@pytest.fixture
def card(monkeypatch):
    """A GPU with 5 bytes free; PyTorch has 7 of the others, of which 3 are taken."""
    for name, value in (("is_available", True), ("memory_reserved", 7), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for name in ("measured_flops", "measured_bandwidth", "measured_pinning"):
        monkeypatch.setattr(machine, name, lambda device: 1.0)


def test_what_is_free_on_a_gpu(card):
    """What is reserved and not taken, and what the weights take that are planned for."""
    assert Machine.of().vram == 5 + 7 - 3
    assert Machine.of(taken={"cuda": 2}).vram == 5 + 7 - 3 + 2


def test_what_the_weights_take_can_be_planned_anew(monkeypatch):
    monkeypatch.setattr(machine, "available_ram", lambda: 1e9)
    """But for a tenth, which is left to other programs."""
    assert Machine.of(device="cpu", taken={"cpu": 10}).ram == 0.9 * (1e9 + 10)
    assert Machine.of(ram=1e9, device="cpu", taken={"cpu": 10}).ram == 1e9
    assert Machine.of(ram="2GB", device="cpu", taken={"cpu": 7}).ram == 2e9


def test_a_cpu_has_no_vram():
    with pytest.raises(ValueError, match="'12GB' is a GPU's, and device='cpu' has none; give ram='12GB'"):
        Machine.of(vram="12GB", device="cpu")


def write_group(folder, names, values, cached):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, values, strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cached} 10\n")


@pytest.mark.parametrize("inner", ["", "user/me"])
def test_what_is_left_of_a_limit(inner, tmp_path):
    """Of the group itself and those around it; memory that only holds files is free."""
    names = ("memory.max", "memory.current")
    write_group(tmp_path / "box" / inner, names, ("max", 30), "inactive_file")
    write_group(tmp_path / "box", names, (100, 40), "inactive_file")
    (tmp_path / "box" / "user").mkdir(exist_ok=True)
    assert list(host_memory._left_in_groups(f"0::/box/{inner}".rstrip("/"), tmp_path)) == [100 - 40 + 10]
    assert list(host_memory._left_in_groups("0::/", tmp_path)) == []


def test_what_is_left_of_a_limit_of_version_1(tmp_path):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(tmp_path / "memory" / "box", names, (100, 40), "total_inactive_file")
    groups = "5:devices:/box\n4:cpu,memory:/box\n0::/"
    assert list(host_memory._left_in_groups(groups, tmp_path)) == [100 - 40 + 10]


def test_the_smallest_limit_counts(monkeypatch):
    monkeypatch.setattr(host_memory, "_left_in_groups", lambda groups, root: iter([12, 11]))
    assert available_ram() == 11
    monkeypatch.setattr(host_memory, "_left_in_groups", lambda groups, root: iter([2**62]))
    assert available_ram() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
