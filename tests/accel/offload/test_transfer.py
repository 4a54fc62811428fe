"""Copies that fail, and the thread that queues them."""

import threading

import pytest
import torch
from torch import nn

from tests.accel.offload.recording import RecordingDevice
from wan22.accel.offload.layout import PackedBlock
from wan22.accel.offload.transfer import Loader


@pytest.fixture
def block():
    """A block of four pieces of a loader's staging buffer."""
    found = PackedBlock("block")
    found.add(nn.Parameter(torch.ones(1024)))
    return found


def loader_for(device):
    loader = Loader(device)
    loader.chunk_bytes = 1024
    return loader


def test_the_thread_uses_the_device(block):
    class Second(RecordingDevice):
        def use_in_thread(self):
            used.append(threading.current_thread().name)

    used = []
    device = Second()
    loader = loader_for(device)
    buffer = device.allocate(block.nbytes)
    device.finish(loader.send(block, buffer, "mmap").mark())
    loader.close()
    assert len(used) == 1 and used[0].startswith("wan22-weights")
    assert buffer.view(torch.float32).eq(1).all()


def test_a_copy_that_fails_midway_waits_for_what_is_queued(block, monkeypatch):
    """Before anybody hears of it, who would give the buffer to others."""

    def read(self, target, start):
        if start == 2048:
            raise OSError("cut off")
        target.zero_()

    monkeypatch.setattr(PackedBlock, "read", read)
    device = RecordingDevice()
    loader = loader_for(device)
    transfer = loader.send(block, device.allocate(block.nbytes), "mmap")
    with pytest.raises(OSError, match="cut off"):
        transfer.mark()
    assert [record.kind for record in device.records].count("arrive") == 2
    transfer.drop(device)
    loader.close()
