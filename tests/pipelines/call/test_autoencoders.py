"""What pipelines ask of an autoencoder."""

import pytest
import torch

from tests.accel.offload.recording import RecordingDevice
from tests.models.vaes import random_latents, random_video, tiny_vae
from wan22.accel.offload.histories import HostHistories
from wan22.models.temporal_cache import TemporalCache
from wan22.pipelines.call import autoencoders


@pytest.mark.parametrize(("strips", "device"), [(None, "cuda:0"), (4, "cpu"), (4, "cuda:0")])
def test_histories_are_on_the_host_while_a_gpu_works_in_strips(strips, device, monkeypatch):
    vae, asked = tiny_vae("2.1"), []
    monkeypatch.setattr(autoencoders, "CudaDevice", lambda device: asked.append(device) or RecordingDevice())
    if strips:
        vae.enable_strips(strips)
    cache = autoencoders._caches(vae, torch.device(device))()
    on_host = bool(strips) and device != "cpu"
    assert type(cache) is (HostHistories if on_host else TemporalCache)
    assert asked == ([torch.device(device)] if on_host else [])


@pytest.mark.parametrize("retry", [False, True])
def test_histories_on_the_host_change_nothing(retry, monkeypatch):
    vae, device = tiny_vae("2.2"), RecordingDevice()
    z = random_latents(vae, 1, 3, 4, 2)
    pieces = random_video(vae, 1, 3, 4, 2).split(3, dim=2)
    vae.enable_strips(2)

    def results():
        return autoencoders.encode(vae, pieces), torch.cat(list(autoencoders.decode(vae, z, retry)), dim=1)

    plain = results()
    monkeypatch.setattr(autoencoders, "_caches", lambda vae, _: lambda: HostHistories(device))
    assert all(map(torch.equal, results(), plain))
    assert device.copied() > 0


@pytest.mark.parametrize(
    ("version", "cudnn", "dtype", "warned"),
    [
        ("2.9.0+cu128", 91002, torch.bfloat16, True),
        ("2.9.0+cu128", 92100, torch.float16, True),
        ("2.9.1+cu128", 91002, torch.bfloat16, True),
        ("2.9.1+cu128", 91501, torch.bfloat16, False),
        ("2.9.0+cu128", 91002, torch.float32, False),
        ("2.10.0+cu128", 91002, torch.bfloat16, False),
    ],
)
def test_convolutions_without_cudnn_are_warned_of(version, cudnn, dtype, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    autoencoders.warn_of_slow_convolutions.cache_clear()
    for _ in range(2):
        autoencoders.warn_of_slow_convolutions("cuda", dtype)
        autoencoders.warn_of_slow_convolutions("cpu", dtype)
    assert caplog.text.count("without cuDNN") == warned
    autoencoders.warn_of_slow_convolutions.cache_clear()
