"""SpargeAttn's package: what it is called with, and what is said where it cannot be used."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.builders import latents_of, random_pipeline
from wan22 import SpargeAttention
from wan22.accel import attention
from wan22.accel.sparse import sparge
from wan22.accel.sparse.sparge import check_sparge, sparge_kernel
from wan22.models.attention import native

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_known():
    yield
    sparge._function.cache_clear()
    attention.failure.cache_clear()


@pytest.fixture
def package(monkeypatch):
    """A package that runs here, and what it was called with. It attends to the first keys alone."""
    calls = []

    def function(q, k, v, topk=0.5, tensor_layout="HND", **others):
        calls.append({"topk": topk, "tensor_layout": tensor_layout, **others})
        most = round(topk * k.shape[1])
        return native(q, k[:, :most], v[:, :most])

    package = SimpleNamespace(spas_sage2_attn_meansim_topk_cuda=function)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", package)
    monkeypatch.setattr(sparge, "_refuses", lambda device, dtype, head_dim: None)
    return calls


def test_what_the_package_is_called_with(package):
    q, k, v = torch.randn(3, 1, 128, 2, 64)
    found = sparge_kernel(0.25)(q, k, v)
    torch.testing.assert_close(found, native(q, k[:, :32], v[:, :32]))
    assert package == [{"topk": 0.25, "tensor_layout": "NHD"}]


def test_a_call(package):
    pipe = random_pipeline()
    size = {"height": 64, "width": 64, "num_frames": 29}  # 128 tokens
    exact = latents_of(pipe, **size)
    found = latents_of(pipe, **size, attention=SpargeAttention(0.3, dense_steps=0))
    tried = [call for call in package if call["topk"] == 1]
    assert len(tried) == 2, "tried once, at two lengths"
    assert len(package) == 2 + 6, "a layer in each pass of three steps"
    assert not torch.equal(found, exact)
    every = latents_of(pipe, **size, attention=SpargeAttention(1.0, dense_steps=0))
    torch.testing.assert_close(every, exact, rtol=1e-5, atol=1e-5)
    told = "needs videos of at least 128 tokens, this one has 112; leave attention out"
    with pytest.raises(ValueError, match=told):
        latents_of(pipe, **size | {"num_frames": 25}, attention="sparge")


def test_a_package_that_computes_something_else_is_refused(package, monkeypatch):
    broken = SimpleNamespace(spas_sage2_attn_meansim_topk_cuda=lambda q, k, v, **others: 2 * v)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", broken)
    with pytest.raises(ValueError, match=r"cannot be used on cpu .*: it deviates by"):
        check_sparge(CPU, torch.float32, 64)


def test_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "spas_sage_attn", None)
    monkeypatch.setattr(sparge, "_refuses", lambda device, dtype, head_dim: None)
    told = (
        r"SpargeAttn is not installed: pip install --no-build-isolation git\+https://github.com/thu-ml/Sparge"
    )
    with pytest.raises(ValueError, match=told):
        check_sparge(CUDA, torch.bfloat16, 128)


def test_where_it_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "spas_sage_attn", SimpleNamespace())
    monkeypatch.setattr(sparge, "_refuses", lambda device, dtype, head_dim: None)
    with pytest.raises(ValueError, match=r"AttributeError: .*spas_sage2_attn_meansim_topk_cuda"):
        check_sparge(CUDA, torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "told"),
    [
        (CPU, torch.bfloat16, 128, "it runs on cuda only"),
        (CUDA, torch.float32, 128, "there is no GPU|it computes in"),
        (CUDA, torch.bfloat16, 32, "there is no GPU|its head size must be 64 or 128"),
    ],
)
def test_where_it_does_not_run(device, dtype, head_dim, told):
    with pytest.raises(ValueError, match=f"attention='sparge' cannot be used on {device.type} .*({told})"):
        check_sparge(device, dtype, head_dim)
