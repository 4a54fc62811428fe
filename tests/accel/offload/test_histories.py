"""Histories on the host: the same results, copies that come in time, and little on the device."""

from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.accel.offload.recording import RecordingDevice
from tests.models.vaes import FAMILIES, random_latents, random_video, tiny_vae
from wan22.accel.offload.histories import HostHistories
from wan22.accel.planning.trace import TracedDevice, peak_bytes
from wan22.models.temporal_cache import TemporalCache


class CheckedDevice(RecordingDevice):
    """Also refuses to copy from, or to, memory that has been freed meanwhile."""

    def __init__(self):
        super().__init__()
        self._memory = []  # of copies on their way: mark, both sides

    def copy(self, buffer, source, after):
        sides = [StorageWeakRef(tensor.untyped_storage()) for tensor in (buffer, source)]
        mark = super().copy(buffer, source, after)
        # The queue must not be what keeps the memory alive.
        point, _, _, what = self._queue.pop()
        where, data = buffer.data_ptr(), source.clone()
        self._queue.append((point, _Address(where, buffer.nbytes), data, what))
        self._memory.append((mark, sides))
        return mark

    def finish(self, mark):
        for queued, sides in self._memory:
            if queued.number <= mark.number:
                assert not any(side.expired() for side in sides), "memory was freed under a copy"
        self._memory = [(queued, sides) for queued, sides in self._memory if queued.number > mark.number]
        super().finish(mark)

    @property
    def under_way(self):
        return len(self._queue)


class _Address:
    """Memory that is written to, and not kept alive."""

    def __init__(self, address, nbytes):
        self.address, self.nbytes = address, nbytes

    def copy_(self, source):
        import ctypes

        ctypes.memmove(self.address, source.contiguous().data_ptr(), self.nbytes)


@pytest.mark.parametrize("strips", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_histories_on_the_host_is_the_same_to_the_bit(family, strips):
    vae, device = tiny_vae(family), CheckedDevice()
    vae.enable_strips(strips)
    for frames in (5, 1):  # of the next clip nothing is left
        z = random_latents(vae, 2, frames, 6, 2)
        expected = torch.cat(list(vae.decode_stream(z)), dim=2)
        found = torch.cat(list(vae.decode_stream(z, caches=partial(HostHistories, device))), dim=2)
        assert torch.equal(found, expected)
    assert device.copied() > 0 and device.under_way == 0


@pytest.mark.parametrize("strips", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_with_histories_on_the_host_is_the_same_to_the_bit(family, strips):
    """Also where layers that repeat their result are left out, so that other histories come next."""
    vae, device = tiny_vae(family), CheckedDevice()
    vae.enable_strips(strips)
    x = random_video(vae, 1, 14, 6, 1)
    x[:, :, 9:45] = 0
    expected = torch.cat([p.parameters for p in vae.encode_stream([x])], dim=2)
    stream = vae.encode_stream([x], caches=partial(HostHistories, device))
    assert torch.equal(torch.cat([p.parameters for p in stream], dim=2), expected)
    assert device.under_way == 0


def test_what_comes_next_is_fetched_before_it_is_needed():
    device = CheckedDevice()
    cache = HostHistories(device)
    x = torch.ones(1, 1, 2, 1, 2)
    for chunk in range(3):
        for layer in "abc":
            copies = len([r for r in device.records if r.kind == "copy"])
            past = cache.exchange(layer, x + chunk, 2)
            assert past is None if chunk == 0 else torch.equal(past, x + chunk - 1)
            queued = len([r for r in device.records if r.kind == "copy"]) - copies
            # The new history leaves and the next one comes; only the very first one comes as it is needed.
            assert queued == {0: 1, 1: 3 if layer == "a" else 2, 2: 2}[chunk]
    cache.close()
    assert device.under_way == 0


def test_the_device_holds_few_histories():
    device = RecordingDevice()
    cache = HostHistories(device)
    x = torch.ones(1, 1, 2, 1, 2)
    for _ in range(3):
        for layer in "abcdefgh":
            cache.exchange(layer, x, 2)
            assert len(cache._leaving) <= 2
    assert device.peak <= 2 * x.nbytes


def test_a_stream_that_ends_early_leaves_no_copies_under_way():
    vae, device = tiny_vae("2.1"), CheckedDevice()
    stream = vae.decode_stream(random_latents(vae, 1, 4, 2, 2), caches=partial(HostHistories, device))
    next(stream), next(stream), next(stream)
    assert device.under_way > 0
    stream.close()
    assert device.under_way == 0


def test_where_the_system_does_not_pin():
    class Unpinned(CheckedDevice):
        def allocate_host(self, nbytes):
            raise MemoryError("the system does not pin")

    vae = tiny_vae("2.1")
    z = random_latents(vae, 1, 3, 2, 2)
    stream = vae.decode_stream(z, caches=partial(HostHistories, Unpinned()))
    assert torch.equal(torch.cat(list(stream), dim=2), torch.cat(list(vae.decode_stream(z)), dim=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_memory_counts_the_host_apart(family):
    vae = tiny_vae(family).to("meta")
    z = random_latents(vae, 1, 3, 6, 2).to("meta")

    def stream(caches):
        for _ in vae.decode_stream(z, caches=caches):
            pass

    histories = TemporalCache()
    for part in vae.post_quant_conv(z).split(1, dim=2):
        vae.decode_chunk(part, histories)
    held = sum(history.nbytes for history in histories._history.values())
    device = TracedDevice()
    assert peak_bytes(stream, partial(HostHistories, device)) < peak_bytes(stream, TemporalCache) - held / 3
    assert device.host == held
