"""The stand-in is as slow as the rules allow, and counts what is there; a GPU keeps the same rules."""

import gc

import pytest
import torch

from tests.accel.offload.offloaders import DEVICES, make_device
from tests.accel.offload.recording import RecordingDevice
from tests.fake_card import FakeCard
from wan22.accel.offload import devices
from wan22.accel.offload.devices import CudaDevice


@pytest.mark.parametrize("kind", DEVICES)
def test_a_copy(kind):
    device = make_device(kind)
    buffer, source = device.allocate(512), device.allocate_host(512)
    source.copy_(torch.arange(512) % 256)
    mark = device.copy(buffer[128:384], source[:256], device.release(buffer))
    device.wait(mark)
    assert torch.equal(buffer[128:384].cpu(), source[:256])
    device.finish(mark)
    device.trim()


def test_copies_arrive_in_order_when_they_are_waited_for():
    device = RecordingDevice()
    buffers = [device.allocate(4) for _ in range(3)]
    source = device.allocate_host(4)
    device.names = {buffer.data_ptr(): f"{i}" for i, buffer in enumerate(buffers)}
    marks = [device.copy(b, source.fill_(i), device.release(b)) for i, b in enumerate(buffers)]
    assert all((buffer == 255).all() for buffer in buffers)
    device.wait(marks[1])
    assert [int(buffer[0]) for buffer in buffers] == [2, 2, 255]  # what the source holds by then
    device.finish(marks[2])
    assert int(buffers[2][0]) == 2
    assert [r.what for r in device.records if r.kind == "arrive"] == ["0", "1", "2"]
    assert device.copied() == 12
    assert device.copied("1") == 4


def test_released_memory_is_nan():
    device = RecordingDevice()
    buffer = device.allocate(64)
    buffer.zero_()
    device.release(buffer)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert buffer.view(dtype).float().isnan().all()


def test_a_copy_over_what_may_still_be_read_is_refused():
    device = RecordingDevice()
    buffer, source = device.allocate(4), device.allocate_host(4).zero_()
    with pytest.raises(RuntimeError, match="a copy over memory that computation may still read"):
        device.copy(buffer, source, None)
    early = device.release(buffer)
    late = device.release(buffer)
    for mark in (None, early):
        with pytest.raises(RuntimeError):
            device.copy(buffer, source, mark)
    mark = device.copy(buffer, source, late)
    device.copy(buffer, source, None)  # behind it
    device.wait(mark)
    with pytest.raises(RuntimeError):
        device.copy(buffer, source, late)


def test_memory_is_there_as_long_as_any_tensor_on_it():
    device = RecordingDevice(capacity=1000)
    buffer = device.allocate(600)
    view = buffer[:8].view(torch.float32)
    assert device.holds(view)
    assert (device.resident, device.free_bytes()) == (600, 400)
    with pytest.raises(torch.OutOfMemoryError, match="401 bytes: 600 of 1000 are taken"):
        device.allocate(401)
    del buffer
    assert device.resident == 600
    del view
    gc.collect()
    assert (device.resident, device.peak) == (0, 600)
    assert [record.kind for record in device.records] == ["allocate", "free"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda():
    with pytest.raises(ValueError, match="there is no CUDA device here, and cuda is one; plan with"):
        CudaDevice()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pages_are_found_before_they_are_pinned(monkeypatch):
    order = []
    monkeypatch.setattr(devices, "fault_in", lambda buffer: order.append(buffer.data_ptr()))
    register = FakeCard.register
    monkeypatch.setattr(
        FakeCard, "register", lambda self, a, n, f: order.append(-a) or register(self, a, n, f)
    )
    with FakeCard():
        buffer = CudaDevice().allocate_host(5 * 2**20 + 1)
        assert order == [buffer.data_ptr(), -buffer.data_ptr()]
        del buffer
        gc.collect()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_memory_is_pinned_exact_and_given_back(monkeypatch):
    device, given_back = CudaDevice(), []
    buffer = device.allocate_host(5 * 2**20 + 1)
    assert buffer.nbytes == 5 * 2**20 + 1
    assert buffer.is_pinned()
    view, address = buffer[16:], buffer.data_ptr()
    del buffer
    assert view.is_pinned()
    cudart = torch.cuda.cudart()
    unregister = cudart.cudaHostUnregister
    monkeypatch.setattr(
        cudart, "cudaHostUnregister", lambda address: given_back.append((address, int(unregister(address))))
    )
    del view
    gc.collect()
    assert given_back == [(address, 0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinning_that_fails_leaves_the_device_usable(monkeypatch):
    device, buffer = CudaDevice(), CudaDevice().allocate_host(4096)
    cudart = torch.cuda.cudart()
    register = cudart.cudaHostRegister
    monkeypatch.setattr(
        cudart, "cudaHostRegister", lambda address, size, flags: register(buffer.data_ptr(), size, flags)
    )
    with pytest.raises(MemoryError, match="the system does not pin 0 MiB of host memory"):
        device.allocate_host(4096)  # where there is pinned memory already
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_copies_run_beside_computation():
    """A copy is over before a long computation that was queued earlier, unless it waits for that."""
    device = CudaDevice()
    source, size = device.allocate_host(2**20), 8192
    buffers = [device.allocate(2**20) for _ in range(2)]
    before = device.release(buffers[0])
    torch.cuda.synchronize()
    x = torch.randn(size, size, device="cuda")
    for _ in range(20):
        x = x @ x
    computed = torch.cuda.current_stream().record_event()
    beside = device.copy(buffers[0], source, before)
    behind = device.copy(buffers[1], source, device.release(buffers[1]))
    device.finish(beside)
    assert not computed.query()
    device.finish(behind)
    assert computed.query()
